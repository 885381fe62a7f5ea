"""Batches made ahead of time by worker processes, with the time the model waited for them."""

import os
import signal
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from looplm.data.pack import Batch
from looplm.data.sources import Source
from looplm.errors import LooplmError

MOST_AHEAD = 64  # batches of a worker: each holds some open files until it is taken


class _Numbered(Dataset[Batch | LooplmError]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Batch | LooplmError:
        try:
            return self.source.batch(index)
        except LooplmError as error:  # raised where it is asked for: a worker would add its traceback to the message
            return error


class Loader:
    """Iterates over batches `start`, `start + step`, ... for ever; workers make `n_ahead` of them before they are asked
    for. `seconds_waited` is the time spent waiting for them."""

    def __init__(self, source: Source, *, start: int, n_workers: int, step: int = 1, n_ahead: int = 4) -> None:
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # one thread per worker; also silences a warning at fork
        self.seconds_waited = 0.0
        self._loader = DataLoader(
            _Numbered(source),
            batch_size=None,
            sampler=range(start, 1 << 62, step),
            num_workers=n_workers,
            prefetch_factor=min(MOST_AHEAD, max(4, -(-n_ahead // n_workers))) if n_workers else None,
            worker_init_fn=_ignore_signals,
            # an unused generator: the default draws a seed from torch's global generator, once more at every resume
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self.seconds_waited += time.perf_counter() - started
            if isinstance(batch, LooplmError):
                raise batch
            # what comes from a worker holds an open file for every tensor, and a step may hold hundreds of batches
            yield batch.clone() if self._loader.num_workers else batch


def _ignore_signals(worker_id: int) -> None:
    """Ctrl-C, torchrun, Slurm and a closed terminal signal the whole process group; the trainer decides when its
    workers end."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
