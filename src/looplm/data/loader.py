"""Batches made ahead of time by worker processes, with the time the model waited for them."""

import os
import signal
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from looplm.data.pack import Batch
from looplm.data.sources import Source


class _Numbered(Dataset[Batch]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __getitem__(self, index: int) -> Batch:
        return self.source.batch(index)


class Loader:
    """Iterates over batches `start`, `start + step`, ... for ever. `seconds_waited` is the time spent waiting for
    them."""

    def __init__(self, source: Source, *, start: int, n_workers: int, step: int = 1) -> None:
        os.environ.setdefault(
            "TOKENIZERS_PARALLELISM", "false"
        )  # one thread per worker; also silences a warning at fork
        self.seconds_waited = 0.0
        self._loader = DataLoader(
            _Numbered(source),
            batch_size=None,
            sampler=range(start, 1 << 62, step),
            num_workers=n_workers,
            prefetch_factor=4 if n_workers else None,
            worker_init_fn=_ignore_interrupt,
            # its own, unused: the default draws a seed from torch's global generator, once more for every resume
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch]:
        batches = iter(self._loader)
        while True:
            started = time.perf_counter()
            batch = next(batches)
            self.seconds_waited += time.perf_counter() - started
            yield batch


def _ignore_interrupt(worker_id: int) -> None:
    """Ctrl-C, torchrun and Slurm signal the whole process group; the trainer decides when its workers end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
