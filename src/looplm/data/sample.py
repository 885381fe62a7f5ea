"""A sample of several sources that gives each an equal share of bytes, with a part held out to measure on.

Not a shuffle for training a model: it draws enough of each kind of text to learn a vocabulary from.
"""

import random
from collections.abc import Callable, Iterator, Sequence

from looplm.data.documents import parts_of, read_documents
from looplm.data.records import Skipped, check_field
from looplm.errors import ConfigError

PIECE = 2**14  # characters; longer documents are taken piece by piece, so that none takes all there is
HELD_OUT_EVERY = 20  # pieces
MEASURED_BYTES = 1_000_000  # of a source, at most


class Source:
    """One source and what was taken of it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.parts = parts_of(name)
        self.n_documents = 0
        self.n_bytes = 0
        self._n_pieces = 0
        self._held_out = _Kept()
        self._learned = _Kept()

    @property
    def is_held_out(self) -> bool:
        """Whether `measured` was kept from the learner: a source of few pieces has none to spare."""
        return bool(self._held_out.texts)

    @property
    def measured(self) -> list[str]:
        """Texts to measure on, `MEASURED_BYTES` or a little more."""
        return self._held_out.texts or self._learned.texts

    def pieces(self, *, field: str | None, skipped: Skipped) -> Iterator[str]:
        """Its documents, long ones cut, its files in a drawn order that is the same each time."""
        for part in random.Random(0).sample(self.parts, len(self.parts)):
            for text in read_documents(part, field=field, skipped=skipped):
                self.n_documents += 1
                for start in range(0, len(text), PIECE):
                    yield text[start : start + PIECE]

    def take(self, text: str, *, size: int) -> bool:
        """Count a piece of `size` bytes; whether it is to be learned from."""
        self.n_bytes += size
        self._n_pieces += 1
        if self._n_pieces % HELD_OUT_EVERY == 0 and self._held_out.keep(text, size=size):
            return False
        self._learned.keep(text, size=size)
        return True


class Sample:
    """At most `n_bytes` of some sources, a hub dataset from its start.

    Raises:
        ConfigError: no source, or no bytes.
        DataError: a source is not there.
    """

    def __init__(self, sources: Sequence[str], *, n_bytes: int, field: str | None = None) -> None:
        if not sources:
            raise ConfigError("no source given; name files, folders, hub:NAME or builtin:python")
        if n_bytes < 1:
            raise ConfigError(f"a sample of {n_bytes} bytes is empty; give 1 or more")
        check_field(field)
        self.n_bytes = n_bytes
        self.skipped = Skipped()
        self.sources = [Source(name) for name in sources]
        self._field = field

    def texts(self, observe: Callable[[int], None] | None = None) -> Iterator[str]:
        """The texts to learn from, once; `observe` is called with the bytes of each piece read. The next piece is
        always of the source that has given least, so the others take what a small source leaves of its share."""
        pieces = {source: source.pieces(field=self._field, skipped=self.skipped) for source in self.sources}
        left = self.n_bytes
        while pieces and left > 0:
            source = min(pieces, key=lambda each: each.n_bytes)
            text = next(pieces[source], None)
            if text is None:
                del pieces[source]
                continue
            data = text.encode()
            if len(data) > left:
                text = data[:left].decode(errors="ignore")  # drops at most a character that was cut
            size = min(len(data), left)
            left -= size
            if observe is not None:
                observe(size)
            if source.take(text, size=size):
                yield text


class _Kept:
    """The first texts of a kind."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._n_bytes = 0

    def keep(self, text: str, *, size: int) -> bool:
        """Whether there was room for it."""
        if self._n_bytes >= MEASURED_BYTES:
            return False
        self.texts.append(text)
        self._n_bytes += size
        return True
