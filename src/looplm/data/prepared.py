"""Training on prepared text (`looplm.data.prepare`): rows cut from the stream of all documents, drawn from all over.

A folder's shards are one stream of tokens, cut into windows of one length without a gap. Whatever the lengths of its
documents, at most one window's tail is left out. Every window is seen once before any is seen again, in an order that
the number of the epoch decides; every phase begins its folders anew, in another order. Folders are mixed by weight:
every 1,024 rows hold each folder's share, give or take a row. All of it is a function of the batch's number, so there
is nothing to store for a resume.
"""

import hashlib
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from tokenizers import Tokenizer

from looplm.config import Config, PositiveFloat, PositiveInt, Size
from looplm.data.bpe import TOKENIZER, load_tokenizer, token_bytes, train_bpe
from looplm.data.documents import BUILTIN_PYTHON, read_documents
from looplm.data.manifest import HELD_OUT, TRAIN, PrepareConfig, Shard, Split, checksum, read_manifest
from looplm.data.prepare import ends_of, prepare
from looplm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from looplm.data.pack import Batch

BLOCK = 1024  # rows, among which every folder has its share
MOST_FOLDERS = 32
BUILTIN_VOCAB = 4096
# the first word of a seed: the order of windows and the mixture of folders are drawn independently
ORDER_STREAM, MIX_STREAM = 0, 1


class PhaseConfig(Config):
    """A stretch of the training with another mixture or row length; a field that is null is as outside the phases."""

    n_batches: PositiveInt | None = None
    """Micro-batches; null in the last phase, which lasts as long as the run."""
    folders: dict[str, PositiveFloat] | None = None
    """Prepared folders with their weights."""
    n_rows: Size | None = None
    """Rows of a micro-batch."""
    row_len: Size | None = None
    """Tokens of a row."""


class PreparedConfig(Config):
    """Text that `looplm data prepare` has tokenised."""

    kind: Literal["prepared"] = "prepared"
    folders: dict[str, PositiveFloat]
    """Prepared folders with their weights, or one folder; builtin:python is the Python standard library."""
    n_rows: Size = 16
    """Rows of a micro-batch."""
    n_tokens: Size | None = None
    """Tokens of a micro-batch, instead of n_rows, whatever the length of its rows; null for n_rows."""
    row_len: Size = 512
    """Tokens of a row."""
    mask_documents: bool = False
    """Whether tokens see only their own document."""
    phases: list[PhaseConfig] = Field(default_factory=list)
    """Phases, one after another; empty for a run without phases."""

    @field_validator("folders", mode="before")
    @classmethod
    def _one_folder(cls, folders: Any) -> Any:
        return {folders: 1.0} if isinstance(folders, str) else folders

    @model_validator(mode="after")
    def _in_order(self) -> "PreparedConfig":
        for phase in self.phases[:-1]:
            if phase.n_batches is None:
                raise ValueError("a phase without n_batches lasts for ever: only the last one may")
        if self.phases and self.phases[-1].n_batches is not None:
            raise ValueError(
                f"the last phase lasts as long as the run, not n_batches {self.phases[-1].n_batches}: leave that out, "
                "and end the run with --steps or --tokens"
            )
        for folders in (self.folders, *(phase.folders for phase in self.phases if phase.folders is not None)):
            if not 0 < len(folders) <= MOST_FOLDERS:
                raise ValueError(f"{len(folders)} folders are mixed; give 1 to {MOST_FOLDERS}")
        if self.n_tokens is not None and self.n_tokens < self.longest_row:
            raise ValueError(f"a micro-batch of n_tokens {self.n_tokens} holds no row of {self.longest_row}: raise it")
        return self

    def in_full(self) -> "list[Phase]":
        """The phases, their null fields filled in."""
        return [self._in_full(phase) for phase in self.phases or [PhaseConfig()]]

    def _in_full(self, phase: PhaseConfig) -> "Phase":
        row_len = self.row_len if phase.row_len is None else phase.row_len
        n_rows = self.n_rows if self.n_tokens is None else self.n_tokens // row_len
        if phase.n_rows is not None:
            n_rows = phase.n_rows
        return Phase(phase.n_batches, self.folders if phase.folders is None else phase.folders, n_rows, row_len)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row of any phase."""
        return max(phase.row_len for phase in self.in_full())


@dataclass(frozen=True)
class Phase:
    """A `PhaseConfig` in full; `n_batches` of the last one does not count."""

    n_batches: int | None
    folders: dict[str, float]
    n_rows: int
    row_len: int


class TokenStream:
    """One split of a prepared folder, all shards end to end, read by memory map."""

    def __init__(self, folder: Path, *, split: Split) -> None:
        manifest = read_manifest(folder)
        if not manifest.complete:
            raise DataError(
                f"{str(folder)!r} is not finished: run its `looplm data prepare` command again, which continues"
            )
        self.folder, self.split, self.manifest = folder, split, manifest
        self.shards = [shard for shard in manifest.shards if shard.split == split]
        # shards are little-endian on every machine
        self.dtype = np.dtype(manifest.dtype).newbyteorder("<")
        # (n_shards + 1,): where each shard begins in the stream, and where the last one ends
        self.starts = np.cumsum([0, *(shard.n_tokens for shard in self.shards)])
        for shard in self.shards:
            # the size only: checksums would read everything, and `looplm data prepare --inspect` tests them
            self._check_size(shard)

    @property
    def n_tokens(self) -> int:
        """Tokens of all shards."""
        return int(self.starts[-1])

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """Where each document ends, its end-of-text token included."""
        parts = zip(self.shards, self.starts, strict=False)
        # a file counts from the beginning of its shard, the stream from that of the first
        loaded = [self._ends_of(shard) + start for shard, start in parts]
        return np.concatenate(loaded) if loaded else np.zeros(0, dtype=np.int64)

    def _ends_of(self, shard: Shard) -> NDArray[np.int64]:
        path = ends_of(self.folder / shard.name)
        try:
            ends = np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{str(path)!r} cannot be read ({error}); remove the folder and prepare it again") from None
        is_whole = isinstance(ends, np.ndarray) and ends.shape == (shard.n_documents,) and ends.dtype == np.int64
        if not is_whole or ends[0] < 1 or (np.diff(ends) < 1).any() or ends[-1] != shard.n_tokens:
            raise DataError(f"{str(path)!r} is not of its shard; remove the folder and prepare it again")
        return ends

    def read(self, start: int, length: int) -> NDArray[np.int64]:
        """Tokens `start` up to `start + length` of the stream."""
        found: list[NDArray[Any]] = []
        # the last shard that begins at or before `start`; a window may run on into the next ones
        shard_idx = int(np.searchsorted(self.starts, start, side="right")) - 1
        while length:
            at = start - int(self.starts[shard_idx])
            piece = self._tokens(shard_idx)[at : at + length]
            if piece.max() >= self.manifest.vocab_size:
                path = self.folder / self.shards[shard_idx].name
                raise DataError(
                    f"shard {str(path)!r} is damaged: it holds id {piece.max()} of {self.manifest.vocab_size}; remove "
                    "the folder and prepare it again"
                )
            found.append(piece)
            start, length, shard_idx = start + len(piece), length - len(piece), shard_idx + 1
        return np.concatenate(found).astype(np.int64)

    def __getstate__(self) -> dict[str, Any]:
        """Memory maps are opened anew where a worker process needs them."""
        return {name: value for name, value in vars(self).items() if name not in ("ends", "_open")}

    def _tokens(self, shard_idx: int) -> NDArray[Any]:
        # opened at the first read, so that a process maps only the shards that it reads
        opened = self.__dict__.setdefault("_open", {})
        if shard_idx not in opened:
            opened[shard_idx] = np.memmap(self.folder / self.shards[shard_idx].name, dtype=self.dtype, mode="r")
        return opened[shard_idx]

    def _check_size(self, shard: Shard) -> None:
        path = self.folder / shard.name
        wanted = shard.n_tokens * self.dtype.itemsize
        size = path.stat().st_size if path.is_file() else None
        if size != wanted:
            is_what = "is not there" if size is None else f"has {size:,} bytes instead of {wanted:,}"
            raise DataError(f"shard {str(path)!r} {is_what}; remove the folder and prepare it again")


class PreparedSource:
    """Rows of the mixture. With `held_out`, the held-out documents of the last phase's folders, one row after
    another."""

    def __init__(self, config: PreparedConfig, *, seed: int, held_out: bool = False) -> None:
        self.config, self.seed, self.held_out = config, seed, held_out
        self.phases = config.in_full()
        split: Split = HELD_OUT if held_out else TRAIN
        names = sorted({name for phase in self.phases for name in phase.folders})
        self.streams = {name: TokenStream(open_folder(name), split=split) for name in names}
        self._check()
        first = next(iter(self.streams.values())).manifest
        self.vocab_size, self.end_id = first.vocab_size, first.end_id
        # text that has changed since has another fingerprint, and a resume is refused
        sums = [shard.sha256 for stream in self.streams.values() for shard in stream.shards]
        self.fingerprint = hashlib.sha256("".join(sums).encode()).hexdigest()

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text."""
        first = next(iter(self.streams.values()))
        path = first.folder / TOKENIZER
        tokenizer = load_tokenizer(path)
        if checksum(path) != first.manifest.tokenizer:
            raise DataError(
                f"{str(path)!r} is not what the text was prepared with; remove the folder and prepare it again"
            )
        return tokenizer

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        """How many bytes each id stands for (vocab_size,), 0 for tags."""
        return np.array(token_bytes(self.tokenizer), dtype=np.int64)

    @property
    def n_held_out(self) -> int:
        """Held-out batches; the last one may be short."""
        return -(-len(self._held_out_rows) // self.phases[-1].n_rows)

    def batch(self, index: int) -> "Batch":
        """Micro-batch number `index`."""
        if self.held_out:
            n_rows = self.phases[-1].n_rows
            return self._stack(self._held_out_rows[index * n_rows : (index + 1) * n_rows], self.phases[-1])
        phase_idx, number = self.phase(index)
        phase = self.phases[phase_idx]
        rows = [self._row(phase_idx, number * phase.n_rows + row) for row in range(phase.n_rows)]
        return self._stack(rows, phase)

    def phase(self, index: int) -> tuple[int, int]:
        """The phase of a batch, and its number there."""
        for phase_idx, phase in enumerate(self.phases[:-1]):
            assert phase.n_batches is not None
            if index < phase.n_batches:
                return phase_idx, index
            index -= phase.n_batches
        return len(self.phases) - 1, index

    def _row(self, phase_idx: int, row: int) -> tuple[str, int]:
        """Folder and window of row number `row` of a phase."""
        phase = self.phases[phase_idx]
        names = sorted(phase.folders)
        weights = tuple(phase.folders[name] for name in names)
        # the folder that this row is of, and the row's number among all rows of that folder
        which, numbers = mixture_block(weights, row // BLOCK, seed=(self.seed, phase_idx))
        name, number = names[which[row % BLOCK]], int(numbers[row % BLOCK])
        # a window is row_len inputs and the target of the last one, which is the next window's first input
        n_windows = (self.streams[name].n_tokens - 1) // phase.row_len
        # every epoch of a folder has another order, by the number of the epoch in the seed
        epoch, number = divmod(number, n_windows)
        return name, shuffled(number, n_windows, seed=(self.seed, phase_idx, which[row % BLOCK], epoch))

    def _stack(self, rows: Sequence[tuple[str, int]], phase: Phase) -> "Batch":
        import torch  # here, so that looking at a prepared folder takes none

        from looplm.data.pack import IGNORE, Batch

        row_len = phase.row_len
        # (n_rows, row_len + 1): targets are the inputs moved by one token
        windows = np.stack([self.streams[name].read(number * row_len, row_len + 1) for name, number in rows])
        ids, targets = windows[:, :-1], windows[:, 1:].copy()
        if not self.config.mask_documents:
            return Batch(torch.from_numpy(ids.copy()), torch.from_numpy(targets))
        documents = np.zeros(ids.shape, dtype=np.int32)
        for row, (name, number) in enumerate(rows):
            # a token's document is the number of documents that end at or before it
            places = number * row_len + np.arange(row_len)
            documents[row] = np.searchsorted(self.streams[name].ends, places, side="right")
        documents -= documents[:, :1] - 1  # 0 is padding, and numbers stay small
        targets[ids == self.end_id] = IGNORE  # the next document's first token follows from nothing
        return Batch(torch.from_numpy(ids.copy()), torch.from_numpy(targets), torch.from_numpy(documents))

    @cached_property
    def _held_out_rows(self) -> list[tuple[str, int]]:
        phase = self.phases[-1]
        lengths = {name: self.streams[name].n_tokens for name in sorted(phase.folders)}
        rows = [(name, number) for name, length in lengths.items() for number in range((length - 1) // phase.row_len)]
        # in a fixed random order, so that all folders are among the first few rows
        return [rows[index] for index in np.random.default_rng(ORDER_STREAM).permutation(len(rows))]

    def _check(self) -> None:
        """Refuse folders that do not go together or are too short."""
        first, *others = self.streams.values()
        for other in others:
            if other.manifest.tokenizer != first.manifest.tokenizer:
                raise ConfigError(
                    f"{str(other.folder)!r} and {str(first.folder)!r} were prepared with different tokenizers; prepare "
                    "both with one"
                )
            if self.held_out and other.manifest.config.held_out != first.manifest.config.held_out:
                raise ConfigError(
                    f"{str(other.folder)!r} and {str(first.folder)!r} were prepared with different --held-out shares: "
                    "what one holds out the other may learn from; prepare both with one"
                )
        for phase in self.phases:
            for name in phase.folders:
                n_tokens, row_len = self.streams[name].n_tokens, phase.row_len
                if self.held_out and not n_tokens:
                    raise DataError(
                        f"prepared text {name!r} holds nothing out to be scored: prepare it with a larger --held-out, "
                        "or train without, train.validate_every=null"
                    )
                if n_tokens <= row_len:
                    what = "held out" if self.held_out else "to learn from"
                    raise DataError(
                        f"prepared text {name!r} has {n_tokens:,} tokens {what}, and a row has {row_len} and one more: "
                        "give more text or a shorter data.row_len"
                    )


@lru_cache(maxsize=8)
def mixture_block(
    weights: tuple[float, ...], block: int, *, seed: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which source each of the BLOCK rows of a block has, and the number of that row among all of its source."""
    shares = np.array(weights) / sum(weights)
    rest = int(shares.argmax())  # this folder takes the rows that rounding leaves over

    def n_before(block: int) -> NDArray[np.int64]:
        counts = np.floor(block * BLOCK * shares).astype(np.int64)
        counts[rest] += block * BLOCK - counts.sum()
        return counts

    # from exact counts up to both ends of the block: rounding never adds up over blocks
    before, after = n_before(block), n_before(block + 1)
    which = np.repeat(np.arange(len(shares)), after - before)
    # shuffled within the block, so that folders alternate
    which = np.random.default_rng([MIX_STREAM, *seed, block]).permutation(which)
    numbers = np.zeros(BLOCK, dtype=np.int64)
    for source in range(len(shares)):
        mine = which == source
        numbers[mine] = before[source] + np.arange(mine.sum())
    return which, numbers


def shuffled(number: int, n: int, *, seed: tuple[int, ...]) -> int:
    """Position of `number` in a random order of 0 to n - 1 that needs no memory: a Feistel network, applied again until
    its result is below n (Black and Rogaway, 2002)."""
    # two halves of equally many bits hold at most 4 n numbers: 4 walks on average at the most
    half = max(1, (n - 1).bit_length() + 1 >> 1)
    mask = (1 << half) - 1
    # a Feistel round can be undone whatever its mixing does, so all rounds together are a permutation
    keys = _round_keys(seed)
    while True:
        left, right = number >> half, number & mask
        for key in keys:
            # the multipliers of splitmix64, in 64-bit arithmetic
            mixed = (right * 0x9E3779B97F4A7C15 + key) & 0xFFFFFFFFFFFFFFFF
            mixed = ((mixed ^ (mixed >> 29)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
            left, right = right, left ^ ((mixed >> 32) & mask)
        number = left << half | right
        if number < n:
            return number


@lru_cache(maxsize=64)
def _round_keys(seed: tuple[int, ...]) -> tuple[int, ...]:
    rng = np.random.default_rng([ORDER_STREAM, *map(int, seed)])
    return tuple(int(key) for key in rng.integers(0, 1 << 63, size=4))


def open_folder(name: str) -> Path:
    """A prepared folder by its path; builtin:python is prepared in the cache the first time."""
    return builtin_python() if name == BUILTIN_PYTHON else Path(name)


def builtin_python() -> Path:
    """The running Python's standard library, prepared with a tokenizer made for it, in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "looplm"
    folder = cache / f"python-{sysconfig.get_python_version()}-{BUILTIN_VOCAB}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    # made beside its place and renamed: a process that is stopped leaves nothing that looks prepared
    made = Path(tempfile.mkdtemp(dir=cache))
    try:
        tokenizer = train_bpe(read_documents(BUILTIN_PYTHON), vocab_size=BUILTIN_VOCAB)
        prepare(PrepareConfig(sources=[BUILTIN_PYTHON], held_out=0.05), tokenizer, made)
        made.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder
