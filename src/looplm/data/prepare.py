"""From documents to shards: tokens on disk, cut once and read by memory map ever after.

    FOLDER/manifest.json           what was asked for, every shard with its sizes and checksum, and where to go on
    FOLDER/tokenizer.json          the tokenizer, copied
    FOLDER/train-00000.bin         token ids, little-endian, each document followed by the end-of-text token
    FOLDER/train-00000.ends.npy    where each document ends (its end-of-text token included)
    FOLDER/held_out-00000.bin ...  documents that are never learned from, chosen by the hash of their text

A document is held out or not by what it says, so that copies of one fall on the same side. Shards are written one
after another, the manifest last: what was cut short is written again, what was done is kept. Documents are shuffled
within a shard; training draws rows from all over.
"""

import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from tokenizers import Tokenizer

from looplm.config import Config
from looplm.data.bpe import EOS, TOKENIZER, encode_all, n_ids
from looplm.data.documents import Skipped, parts_of, read_documents
from looplm.errors import ConfigError, DataError
from looplm.files import write_whole

MANIFEST = "manifest.json"
TRAIN, HELD_OUT = "train", "held_out"
END_OF_TEXT = (EOS, "<|endoftext|>", "<EOS>", "</s>")  # by whatever name the tokenizer has it
FIM_TAGS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
BATCH = 512  # documents tokenised at a time, on all cores
SHUFFLE_STREAM, FIM_STREAM = 0, 1


class PrepareConfig(Config):
    """What is prepared."""

    sources: list[str] = Field(min_length=1)
    """As `looplm.data.documents` reads them."""
    field: str | None = None
    """Field of a record that holds its text; null for the usual ones."""
    held_out: float = Field(default=0.01, ge=0, lt=1)
    """Share of the documents that is never learned from."""
    fim: float = Field(default=0.0, ge=0, le=1)
    """Share of the documents turned into prefix, suffix, middle (Bavarian et al. 2022), for models that fill in."""
    shard_tokens: PositiveInt = 1 << 24
    """Tokens after which a shard is closed."""
    seed: int = Field(default=0, ge=0)
    """Seeds the order within shards."""


@dataclass
class Shard:
    """One finished file of tokens, as the manifest lists it."""

    name: str
    split: str
    n_tokens: int
    n_documents: int
    n_bytes: int
    """UTF-8 bytes of its documents."""
    sha256: str


@dataclass
class Manifest:
    """What a folder holds and how far it has come."""

    config: dict[str, Any]
    tokenizer: str
    """sha256 of tokenizer.json."""
    vocab_size: int
    end_id: int
    dtype: str
    parts: list[str]
    shards: list[Shard] = field(default_factory=list)
    part: int = 0
    """The part to go on with, and how many of its documents are done."""
    n_done: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    complete: bool = False

    def n_tokens(self, split: str) -> int:
        """Of one split."""
        return sum(shard.n_tokens for shard in self.shards if shard.split == split)


def prepare(
    config: PrepareConfig, tokenizer: Tokenizer, folder: Path, *, on_progress: Callable[[int], None] | None = None
) -> Manifest:
    """Tokenise all sources into `folder`, or go on where an earlier call was stopped. `on_progress` hears of every
    batch how many bytes of text it had.

    Raises:
        ConfigError: the folder was made with other settings, or the tokenizer has no end-of-text token.
        DataError: a source cannot be read, or there is no text.
    """
    manifest = _begin(config, tokenizer, folder)
    tokenizer.encode_special_tokens = True  # a tag that stands in a text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    kept, skipped = _Kept(), Skipped(manifest.skipped)  # of whole parts: one that is gone on with is counted anew
    for part_idx in range(manifest.part, len(manifest.parts)):
        n_done, skipped_here = manifest.n_done if part_idx == manifest.part else 0, Skipped()
        documents = read_documents(manifest.parts[part_idx], field=config.field, skipped=skipped_here)
        for texts in _batched(islice(documents, n_done, None)):
            n_bytes = kept.add(texts, config, tokenizer, end_id=manifest.end_id)
            n_done += len(texts)
            if on_progress is not None:
                on_progress(n_bytes)
            if kept.n_tokens >= config.shard_tokens:
                kept = _close(manifest, kept, folder, seed=config.seed, at=(part_idx, n_done), skipped=skipped)
        skipped += skipped_here
    if kept.n_tokens:
        _close(manifest, kept, folder, seed=config.seed, at=(len(manifest.parts), 0), skipped=skipped)
    if not manifest.n_tokens(TRAIN) and manifest.n_tokens(HELD_OUT):
        raise DataError(f"all documents of {', '.join(config.sources)} are held out: there are few; give --held-out 0")
    if not manifest.n_tokens(TRAIN):
        raise DataError(f"no text to learn from in {', '.join(config.sources)}{f' ({skipped})' if skipped else ''}")
    manifest.complete, manifest.skipped = True, dict(skipped)
    manifest.part, manifest.n_done = len(manifest.parts), 0
    _write_manifest(manifest, folder)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{str(folder)!r} is not prepared text; make it: looplm data prepare --out {folder} SOURCE...")
    try:
        data = json.loads(path.read_text())
        data["shards"] = [Shard(**shard) for shard in data["shards"]]
        return Manifest(**data)
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{str(path)!r} is no manifest ({error}); prepare the folder again") from None


def checksum(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _begin(config: PrepareConfig, tokenizer: Tokenizer, folder: Path) -> Manifest:
    """The manifest to go on with, or a new one."""
    text = tokenizer.to_str()
    new = Manifest(
        config=config.model_dump(mode="json"),
        tokenizer=hashlib.sha256(text.encode()).hexdigest(),
        vocab_size=n_ids(tokenizer),
        end_id=end_of_text(tokenizer),
        dtype="uint16" if n_ids(tokenizer) <= 1 << 16 else "uint32",
        parts=[part for source in config.sources for part in parts_of(source)],
    )
    if config.fim:
        _fim_ids(tokenizer)
    if (folder / MANIFEST).exists():
        old = read_manifest(folder)
        for name in ("config", "tokenizer", "parts"):
            was, wanted = getattr(old, name), getattr(new, name)
            if was != wanted:
                raise ConfigError(
                    f"{str(folder)!r} was prepared with another {name}: {was}, not {wanted}; give another --out"
                )
        return old
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / TOKENIZER, text.encode())
    _write_manifest(new, folder)
    return new


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of a tokenizer's end-of-text token.

    Raises:
        ConfigError: it has none of the usual names.
    """
    for name in END_OF_TEXT:
        found = tokenizer.token_to_id(name)
        if found is not None:
            return int(found)
    raise ConfigError(f"the tokenizer has no end-of-text token; it should have one of {', '.join(END_OF_TEXT)}")


def is_held_out(text: str, *, share: float) -> bool:
    """Whether a document is on the side that is never learned from."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def _fim_ids(tokenizer: Tokenizer) -> list[int]:
    ids = [found for tag in FIM_TAGS if (found := tokenizer.token_to_id(tag)) is not None]
    if len(ids) < len(FIM_TAGS):
        raise ConfigError(f"fim takes a tokenizer with {', '.join(FIM_TAGS)}; leave it out or take another tokenizer")
    return ids


class _Kept:
    """Documents on their way to a shard, by split."""

    def __init__(self) -> None:
        self.documents: dict[str, list[NDArray[np.uint32]]] = {TRAIN: [], HELD_OUT: []}
        self.n_bytes = {TRAIN: 0, HELD_OUT: 0}
        self.n_tokens = 0

    def add(self, texts: Sequence[str], config: PrepareConfig, tokenizer: Tokenizer, *, end_id: int) -> int:
        """Tokenise documents and keep them; how many bytes they have."""
        pieces = [_pieces(text, config) for text in texts]
        encoded = iter(encode_all(tokenizer, [piece for each in pieces for piece in each]))
        tags = _fim_ids(tokenizer) if config.fim else []
        n_bytes = 0
        for text, each in zip(texts, pieces, strict=True):
            ids: list[int] = []
            for number, piece in enumerate(islice(encoded, len(each))):
                ids += [*tags[number : number + 1], *piece] if len(each) > 1 else piece
            split = HELD_OUT if is_held_out(text, share=config.held_out) else TRAIN
            self.documents[split].append(np.array([*ids, end_id], dtype=np.uint32))
            size = len(text.encode())
            self.n_bytes[split] += size
            self.n_tokens += len(ids) + 1
            n_bytes += size
        return n_bytes


def _pieces(text: str, config: PrepareConfig) -> tuple[str, ...]:
    """A document as it is, or cut into prefix, suffix and middle."""
    if not config.fim or is_held_out(text, share=config.held_out):
        return (text,)
    rng = np.random.default_rng([FIM_STREAM, int.from_bytes(hashlib.sha256(text.encode()).digest()[8:16], "big")])
    if rng.random() >= config.fim:
        return (text,)
    first, second = sorted(rng.integers(0, len(text) + 1, size=2))
    return text[:first], text[second:], text[first:second]


def _batched(documents: Iterator[str]) -> Iterator[list[str]]:
    while batch := list(islice(documents, BATCH)):
        yield batch


def _close(manifest: Manifest, kept: _Kept, folder: Path, *, seed: int, at: tuple[int, int], skipped: Skipped) -> _Kept:
    """Write a shard of each split that has documents, then the manifest that knows of them."""
    for split, documents in kept.documents.items():
        if not documents:
            continue
        number = sum(shard.split == split for shard in manifest.shards)
        order = np.random.default_rng([SHUFFLE_STREAM, seed, number]).permutation(len(documents))
        shuffled = [documents[index] for index in order]
        path = folder / f"{split}-{number:05}.bin"
        data = np.concatenate(shuffled).astype(np.dtype(manifest.dtype).newbyteorder("<")).tobytes()
        write_whole(path, data)
        ends = np.cumsum([len(each) for each in shuffled], dtype=np.int64)
        packed = io.BytesIO()
        np.save(packed, ends)
        write_whole(path.with_suffix(".ends.npy"), packed.getvalue())
        shard = Shard(path.name, split, int(ends[-1]), len(ends), kept.n_bytes[split], hashlib.sha256(data).hexdigest())
        manifest.shards.append(shard)
    (manifest.part, manifest.n_done), manifest.skipped = at, dict(skipped)
    _write_manifest(manifest, folder)
    return _Kept()


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    data = {**vars(manifest), "shards": [vars(shard) for shard in manifest.shards]}
    write_whole(folder / MANIFEST, (json.dumps(data, indent=1) + "\n").encode())
