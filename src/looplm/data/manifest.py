"""The manifest of a prepared folder: what was asked for, what it was made from, what it holds and how far it has come.

It also answers whether the text and the options are still those that a folder was made with.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from looplm.config import Config, NonNegativeInt, Number, PositiveInt, Seed, Size
from looplm.data.documents import is_file
from looplm.data.records import Skipped, check_field
from looplm.errors import ConfigError, DataError

MANIFEST = "manifest.json"
Split = Literal["train", "held_out"]
TRAIN: Split = "train"
HELD_OUT: Split = "held_out"
MOST_NAMED = 3  # differences in one error


class PrepareConfig(Config):
    """What is prepared."""

    sources: list[str] = Field(min_length=1)
    """As `looplm.data.documents` reads them."""
    field: str | None = None
    """Field of a record that holds its text, or several separated by commas; null for the usual ones."""
    held_out: Number = Field(default=0.01, ge=0, lt=1)
    """Share of the documents that is never learned from."""
    fim: Number = Field(default=0.0, ge=0, le=1)
    """Share of the documents turned into prefix, suffix, middle (Bavarian et al. 2022), for models that fill in."""
    shard_tokens: Size = 1 << 24
    """Tokens after which a shard is closed."""
    seed: Seed = 0
    """Seeds the order within shards."""

    @field_validator("field")
    @classmethod
    def _named(cls, name: str | None) -> str | None:
        check_field(name)
        return name


@dataclass
class Shard:
    """One finished file of tokens."""

    name: Annotated[str, StringConstraints(pattern=r"^(train|held_out)-[0-9]+\.bin$")]
    split: Split
    n_tokens: PositiveInt
    n_documents: PositiveInt
    n_bytes: NonNegativeInt
    """UTF-8 bytes of its documents."""
    sha256: str
    part: NonNegativeInt = 0
    """Where its documents end: the part, and how many of that part's documents are in this shard or before."""
    n_done: NonNegativeInt = 0


@dataclass
class Origin:
    """A part as it was when it was read; all null for what is no file."""

    size: int | None = None
    mtime_ns: int | None = None
    sha256: str | None = None
    """Null until its documents are read."""
    skipped: dict[str, int] = field(default_factory=dict)
    """What was left out of it, by reason."""


@dataclass
class Manifest:
    """What a folder holds and how far it has come."""

    config: PrepareConfig
    tokenizer: str
    """sha256 of tokenizer.json."""
    vocab_size: PositiveInt
    end_id: NonNegativeInt
    dtype: Literal["uint16", "uint32"]
    parts: list[str]
    origins: list[Origin] = field(default_factory=list)
    """One a part; empty in folders of the versions that did not keep them."""
    shards: list[Shard] = field(default_factory=list)
    part: NonNegativeInt = 0
    """The part to continue with, and how many of its documents are done."""
    n_done: NonNegativeInt = 0
    skipped: dict[str, int] = field(default_factory=dict)
    complete: bool = False

    def n_tokens(self, split: Split) -> int:
        """Of one split."""
        return sum(shard.n_tokens for shard in self.shards if shard.split == split)

    def all_skipped(self, n_parts: int) -> Skipped:
        """What was left out of the first parts, by reason."""
        found = Skipped()
        for each in self.origins[:n_parts]:
            found.update(each.skipped)
        return found

    def to_json(self) -> bytes:
        """What `read_manifest` reads."""
        data = {**asdict(self), "config": self.config.model_dump(mode="json")}
        return (json.dumps(data, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(f"{str(folder)!r} is not prepared text; make it: looplm data prepare --out {folder} SOURCE...")
    try:
        return _reader().validate_json(path.read_bytes(), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"{part}: " for part in first["loc"])
        raise DataError(
            f"{str(path)!r} is no manifest ({where}{first['msg']}); remove {folder} and prepare it again"
        ) from None
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read ({error.strerror})") from None


@cache
def _reader() -> TypeAdapter[Manifest]:
    return TypeAdapter(Manifest)


def checksum(path: Path) -> str:
    """sha256 of a file.

    Raises:
        DataError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read ({error.strerror})") from None


def origin(part: str) -> Origin:
    """A part as it is now, without its checksum."""
    if not is_file(part):
        return Origin()
    found = Path(part).stat()
    return Origin(found.st_size, found.st_mtime_ns)


def refuse_others(old: Manifest, new: Manifest, folder: Path) -> None:
    """Refuse to continue a folder that was begun with other options, another tokenizer or, where it is complete,
    other text.

    Raises:
        ConfigError: it was; the message names what differs.
    """
    was, wanted = dict(old.config), dict(new.config)
    keys = [
        key for key in wanted if key != "sources" and was[key] != wanted[key]
    ]  # sources are compared by their files
    options = [f"{key} {was[key]!r}, not {wanted[key]!r}" for key in keys]
    tokenizers = [f"{old.tokenizer[:12]}..., not {new.tokenizer[:12]}..."] if old.tokenizer != new.tokenizer else []
    texts = _changes(old, new, folder) if old.complete else []
    found = {"with another config": options, "with another tokenizer": tokenizers, "from other text": texts}
    for what, differences in found.items():
        if differences:
            more = f" and {len(differences) - MOST_NAMED:,} more" if len(differences) > MOST_NAMED else ""
            raise ConfigError(
                f"{str(folder)!r} was prepared {what}: {', '.join(differences[:MOST_NAMED])}{more}; "
                f"give another --out, or remove {folder} to prepare it anew"
            )


def _changes(old: Manifest, new: Manifest, folder: Path) -> list[str]:
    """What differs between the text of a complete folder and what there is now."""
    before, after = dict.fromkeys(old.parts, Origin()), set(new.parts)
    changes = [f"{part!r} is gone" for part in old.parts if part not in after]
    changes += [f"{part!r} is new" for part in new.parts if part not in before]
    if old.origins:
        before = dict(zip(old.parts, old.origins, strict=False))
        is_changed = [
            part in before and _has_changed(part, before[part], now)
            for part, now in zip(new.parts, new.origins, strict=True)
        ]
    else:  # the manifest is written last
        written = (folder / MANIFEST).stat().st_mtime_ns
        is_changed = [now.mtime_ns is not None and now.mtime_ns > written for now in new.origins]
    return changes + [f"{part!r} has changed" for part, has in zip(new.parts, is_changed, strict=True) if has]


def _has_changed(part: str, before: Origin, now: Origin) -> bool:
    """A file of the same size and another time is read again: copies and checkouts change times alone."""
    if (before.size, before.mtime_ns) == (now.size, now.mtime_ns):
        return False
    return before.size != now.size or before.sha256 is None or before.sha256 != checksum(Path(part))


def go_back(old: Manifest, new: Manifest) -> list[Shard]:
    """Make `old`, which is not complete, continue with the text of `new`: only shards that hold nothing of a file that
    has changed, or of one after it, are kept. The others are returned."""
    first = 0
    for part, now in zip(new.parts, new.origins, strict=True):
        is_same = first < len(old.origins) and old.parts[first] == part
        if not is_same or (first <= old.part and _has_changed(part, old.origins[first], now)):
            break
        first += 1
    n_kept = sum((shard.part, shard.n_done) <= (first, 0) for shard in old.shards)  # their ends only grow
    old.shards, dropped = old.shards[:n_kept], old.shards[n_kept:]
    if dropped:
        old.part, old.n_done = (old.shards[-1].part, old.shards[-1].n_done) if old.shards else (0, 0)
    old.parts, old.origins = new.parts, [*old.origins[: old.part], *new.origins[old.part :]]
    old.config = new.config
    old.skipped = dict(old.all_skipped(old.part))
    return dropped
