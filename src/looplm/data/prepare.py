"""From documents to shards: tokens on disk, cut once and read by memory map ever after.

    FOLDER/manifest.json           what was asked for, every shard with its sizes and checksum, and where to continue
    FOLDER/tokenizer.json          the tokenizer, copied
    FOLDER/train-00000.bin         token ids, little-endian, each document followed by the end-of-text token
    FOLDER/train-00000.ends.npy    where each document ends (its end-of-text token included)
    FOLDER/held_out-00000.bin ...  documents that are never learned from, chosen by the hash of their text

A document is held out or not by what it says, so that copies of one fall on the same side. Shards are written one
after another, the manifest last: what was cut short is written again, what was done is kept. Documents are shuffled
within a shard; training draws rows from all over.
"""

import fnmatch
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from looplm.data.bpe import EOS, TOKENIZER, check_new, encode_all, n_ids
from looplm.data.documents import is_file, parts_of, read_documents
from looplm.data.manifest import (
    HELD_OUT,
    MANIFEST,
    TRAIN,
    Manifest,
    PrepareConfig,
    Shard,
    Split,
    checksum,
    go_back,
    origin,
    read_manifest,
    refuse_others,
)
from looplm.data.records import Skipped
from looplm.errors import ConfigError, DataError
from looplm.files import lock_folder, write_whole

END_OF_TEXT = (EOS, "<|endoftext|>", "<EOS>", "</s>")  # by whatever name the tokenizer has it
FIM_TAGS = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
BATCH = 512  # documents after which a shard may be closed
GROUP_TEXT = 1 << 24  # characters tokenised at a time, on all cores
MOST_KEPT = 1 << 26  # tokens after which a shard is closed within a batch, where documents are very long
SHUFFLE_STREAM, FIM_STREAM = 0, 1


def prepare(
    config: PrepareConfig, tokenizer: Tokenizer, folder: Path, *, on_progress: Callable[[int], None] | None = None
) -> Manifest:
    """Tokenise all sources into `folder`, or continue where an earlier call was stopped. `on_progress` is called with
    the bytes of text that were just done.

    A folder that is complete and of the same text and options is left as it is. One that was stopped continues with
    what the sources hold now: shards of files that have changed since are made again.

    Raises:
        ConfigError: the folder was made with other settings or of other text, it lies among the sources, or the
            tokenizer has no end-of-text token.
        DataError: a source cannot be read, there is no text, or the folder's disk is full.
        FolderError: another process writes into the folder.
    """
    parts = [part for source in config.sources for part in parts_of(source)]
    _check_apart(config.sources, folder)
    with lock_folder(folder):
        manifest = _begin(config, tokenizer, parts, folder)
        if manifest.complete:
            return manifest
        try:
            _write_shards(manifest, tokenizer, folder, on_progress=on_progress)
        except BaseException:  # Ctrl-C too
            if not manifest.n_tokens(TRAIN):
                _discard(manifest, folder)  # else what is done is kept for the next call
            raise
    return manifest


def _check_apart(sources: Sequence[str], folder: Path) -> None:
    """Refuse to write shards where they would be read as text the next time."""
    out = folder.resolve()
    written = [out / name for name in (MANIFEST, TOKENIZER, f"{TRAIN}-00000.bin", f"{TRAIN}-00000.ends.npy")]
    for source in filter(is_file, sources):
        path, pattern = Path(source).resolve(), Path(os.path.abspath(source)).parts
        is_among = out.is_relative_to(path) if path.exists() else any(_matches(each.parts, pattern) for each in written)
        if is_among or path.is_relative_to(out):
            raise ConfigError(
                f"{str(folder)!r} would hold shards among the texts of {source!r}; give an --out that is outside of it"
            )


def _matches(path: Sequence[str], pattern: Sequence[str]) -> bool:
    """Whether a recursive glob finds a path, which need not exist."""
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_matches(path[start:], pattern[1:]) for start in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _matches(path[1:], pattern[1:])


def _begin(config: PrepareConfig, tokenizer: Tokenizer, parts: list[str], folder: Path) -> Manifest:
    """The manifest to continue with, or a new one."""
    text = tokenizer.to_str()
    new = Manifest(
        config=config,
        tokenizer=hashlib.sha256(text.encode()).hexdigest(),
        vocab_size=n_ids(tokenizer),
        end_id=end_of_text(tokenizer),
        dtype="uint16" if n_ids(tokenizer) <= 1 << 16 else "uint32",
        parts=parts,
        origins=[origin(part) for part in parts],
    )
    if config.fim:
        _fim_ids(tokenizer)
    if (folder / MANIFEST).exists():
        old = read_manifest(folder)
        if old.complete or (old.shards and old.origins):
            refuse_others(old, new, folder)
            if not old.complete:
                dropped = go_back(old, new)
                _write_manifest(old, folder)
                _remove(dropped, folder)
            return old
    else:
        check_new(folder)
    _write_manifest(new, folder)
    _write(folder / TOKENIZER, text.encode())
    return new


def _write_shards(
    manifest: Manifest, tokenizer: Tokenizer, folder: Path, *, on_progress: Callable[[int], None] | None
) -> None:
    """Tokenise what is left to do."""
    tokenizer.encode_special_tokens = True  # a tag that stands in a text is text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    config, kept = manifest.config, _Kept()
    most_kept = max(MOST_KEPT, 4 * config.shard_tokens)
    for part_idx in range(manifest.part, len(manifest.parts)):
        part, read_from = manifest.parts[part_idx], manifest.origins[part_idx]
        n_done, skipped = manifest.n_done if part_idx == manifest.part else 0, Skipped()
        documents = islice(read_documents(part, field=config.field, skipped=skipped), n_done, None)
        for texts in _grouped(documents, n_done):
            n_bytes = kept.add(texts, config, tokenizer, end_id=manifest.end_id)
            n_done += len(texts)
            if on_progress is not None:
                on_progress(n_bytes)
            is_full = kept.n_tokens >= config.shard_tokens and n_done % BATCH == 0
            if is_full or kept.n_tokens >= most_kept:
                kept = _close(manifest, kept, folder, at=(part_idx, n_done))
        if kept.n_tokens >= config.shard_tokens:
            kept = _close(manifest, kept, folder, at=(part_idx, n_done))
        if is_file(part) and n_done:  # what gave nothing may be large: a disk's image is not read to its end
            read_from.sha256 = checksum(Path(part))
        now = origin(part)
        if (now.size, now.mtime_ns) != (read_from.size, read_from.mtime_ns):
            raise DataError(f"{part!r} has changed while it was read; run the command again")
        read_from.skipped = dict(skipped)
    if kept.n_tokens:
        _close(manifest, kept, folder, at=(len(manifest.parts), 0))
    skipped = manifest.all_skipped(len(manifest.parts))
    sources = ", ".join(config.sources)
    if not manifest.n_tokens(TRAIN) and manifest.n_tokens(HELD_OUT):
        raise DataError(f"all documents of {sources} are held out: there are few; give --held-out 0")
    if not manifest.n_tokens(TRAIN):
        raise DataError(f"no text to learn from in {sources}{f' ({skipped})' if skipped else ''}")
    manifest.complete, manifest.skipped = True, dict(skipped)
    manifest.part, manifest.n_done = len(manifest.parts), 0
    _write_manifest(manifest, folder)


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
        self.documents: dict[Split, list[NDArray[np.uint32]]] = {TRAIN: [], HELD_OUT: []}
        self.n_bytes: dict[Split, int] = {TRAIN: 0, HELD_OUT: 0}
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
            split: Split = HELD_OUT if is_held_out(text, share=config.held_out) else TRAIN
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


def _grouped(documents: Iterator[str], n_done: int) -> Iterator[list[str]]:
    """Documents to tokenise at a time, after `n_done` others: up to the next multiple of BATCH, or GROUP_TEXT."""
    group: list[str] = []
    size = 0
    for number, text in enumerate(documents, start=n_done + 1):
        group.append(text)
        size += len(text)
        if size >= GROUP_TEXT or number % BATCH == 0:
            yield group
            group, size = [], 0
    if group:
        yield group


def _close(manifest: Manifest, kept: _Kept, folder: Path, *, at: tuple[int, int]) -> _Kept:
    """Write a shard of each split that has documents, then the manifest that knows of them."""
    for split, documents in kept.documents.items():
        if not documents:
            continue
        number = sum(shard.split == split for shard in manifest.shards)
        order = np.random.default_rng([SHUFFLE_STREAM, manifest.config.seed, number]).permutation(len(documents))
        shuffled = [documents[index] for index in order]
        path = folder / f"{split}-{number:05}.bin"
        data = np.concatenate(shuffled).astype(np.dtype(manifest.dtype).newbyteorder("<")).tobytes()
        _write(path, data)
        ends = np.cumsum([len(each) for each in shuffled], dtype=np.int64)
        packed = io.BytesIO()
        np.save(packed, ends)
        _write(ends_of(path), packed.getvalue())
        sums = int(ends[-1]), len(ends), kept.n_bytes[split], hashlib.sha256(data).hexdigest()
        manifest.shards.append(Shard(path.name, split, *sums, *at))
    (manifest.part, manifest.n_done), manifest.skipped = at, dict(manifest.all_skipped(at[0]))
    _write_manifest(manifest, folder)
    return _Kept()


def ends_of(shard: Path) -> Path:
    """The file of where a shard's documents end."""
    return shard.with_suffix(".ends.npy")


def _write_manifest(manifest: Manifest, folder: Path) -> None:
    _write(folder / MANIFEST, manifest.to_json())


def _write(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data)
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be written ({error.strerror}); mend that and run the command again: what is done "
            "is kept"
        ) from None


def _remove(shards: Sequence[Shard], folder: Path) -> None:
    for path in (folder / shard.name for shard in shards):
        path.unlink(missing_ok=True)
        ends_of(path).unlink(missing_ok=True)


def _discard(manifest: Manifest, folder: Path) -> None:
    """Leave nothing of a folder without text to learn from, so that a mended command begins anew."""
    for name in (MANIFEST, TOKENIZER):
        (folder / name).unlink(missing_ok=True)
    _remove(manifest.shards, folder)
