"""Text as its bytes: a file's first nine tenths to learn from, its last tenth held out. Nothing to train or download
first, and a loss in bits per byte, which can be compared with models that have a tokenizer."""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from looplm.config import Config, Size
from looplm.data.pack import Batch
from looplm.data.text_files import file_size
from looplm.errors import DataError

VOCAB_SIZE = 256
HELD_OUT_SHARE = 0.1
MOST_IN_MEMORY = 1 << 28  # bytes; a file in memory cannot be changed under a run, a longer one is mapped
MOST = 1 << 34  # bytes; all of them are read for the fingerprint, whenever a run starts


class BytesConfig(Config):
    """Windows of a text file, drawn anywhere in its first nine tenths."""

    kind: Literal["bytes"] = "bytes"
    path: str
    """The file."""
    n_rows: Size = 16
    """Rows of a micro-batch."""
    row_len: Size = 256
    """Bytes of a row."""


class BytesSource:
    """Every byte but the window's first is predicted. With `held_out`, windows one after another of the rest."""

    def __init__(self, config: BytesConfig, *, seed: int, held_out: bool = False) -> None:
        self.config, self.seed, self.held_out = config, seed, held_out
        whole = _read(Path(config.path))
        self.fingerprint = hashlib.sha256(whole.data).hexdigest()
        split = round(len(whole) * (1 - HELD_OUT_SHARE))
        self.bytes = whole[split:] if held_out else whole[:split]
        if len(self.bytes) <= config.row_len:
            raise DataError(
                f"text {config.path!r} leaves {len(self.bytes)} bytes to {'score' if held_out else 'learn from'}, and "
                f"a row has {config.row_len} and one more; give a longer text or lower data.row_len"
            )

    @property
    def token_bytes(self) -> NDArray[np.int64]:
        """How many bytes each id stands for (256,)."""
        return np.ones(VOCAB_SIZE, dtype=np.int64)

    @property
    def n_held_out(self) -> int:
        """Batches of held-out windows; the last one may be short."""
        return -(-self._n_windows // self.config.n_rows)

    @property
    def _n_windows(self) -> int:
        """Windows one after another; fewer bytes than one at the end are left out."""
        return (len(self.bytes) - 1) // self.config.row_len

    def batch(self, index: int) -> Batch:
        """Micro-batch number `index`."""
        config = self.config
        if self.held_out:
            first = index * config.n_rows
            starts = np.arange(first, min(first + config.n_rows, self._n_windows)) * config.row_len
        else:
            n_starts = len(self.bytes) - config.row_len
            starts = np.random.default_rng([self.seed, index]).integers(0, n_starts, size=config.n_rows)
        windows = self.bytes[starts[:, None] + np.arange(config.row_len + 1)].astype(np.int64)
        return Batch(torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:]))


def _read(path: Path) -> NDArray[np.uint8]:
    try:
        size = file_size(path)
        if size <= MOST_IN_MEMORY:
            return np.frombuffer(path.read_bytes(), dtype=np.uint8)
    except (DataError, OSError) as error:
        reason = str(error) if isinstance(error, DataError) else f"{str(path)!r} cannot be read ({error.strerror})"
        raise DataError(f"text {reason}; name a file: data.path=FILE") from None
    if size > MOST:
        raise DataError(
            f"text {str(path)!r} has {size:,} bytes, and text as bytes takes {MOST:,} at most; name a part of it, or "
            f"make tokens of it: looplm data prepare {path}"
        )
    return np.memmap(path, dtype=np.uint8, mode="r")
