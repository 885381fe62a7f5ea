"""Averages of weights: over the steps of a run (an exponential moving average), or over its last checkpoints."""

from pathlib import Path

import torch
from torch import Tensor

from looplm.checkpoint import (
    CONFIG,
    MODEL,
    checkpoints,
    own_tensors,
    read_tensors,
    run_folder,
    save_tensors,
)
from looplm.data.bpe import TOKENIZER
from looplm.dist import local
from looplm.errors import ConfigError
from looplm.files import write_whole
from looplm.model.looped import LoopedLM


class MovingAverage:
    """decay * average + (1 - decay) * weights after every step; the decay is smaller in the first steps, so
    that the average soon forgets the initial weights."""

    def __init__(self, model: LoopedLM, *, decay: float) -> None:
        self.model, self.decay = model, decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in own_tensors(model).items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step number `step`."""
        decay = min(self.decay, (1 + step) / (10 + step))
        current = own_tensors(self.model)
        averages = [local(tensor) for tensor in self.tensors.values()]
        torch._foreach_lerp_(averages, [local(current[name]) for name in self.tensors], 1 - decay)


def average_checkpoints(run: Path, out: Path, *, n: int) -> list[Path]:
    """A run folder whose weights are the mean of the newest `n` checkpoints of `run`; the checkpoints taken.

    Raises:
        ConfigError: there are fewer, or `out` exists.
    """
    folder = run_folder(run)
    found = checkpoints(folder)
    if not 2 <= n <= len(found):
        raise ConfigError(f"{str(run)!r} has {len(found)} checkpoints, and an average takes 2 or more, not {n}")
    if out.exists():
        raise ConfigError(f"{str(out)!r} exists; give a new folder")
    total: dict[str, Tensor] = {}
    for path in found[-n:]:
        for name, tensor in read_tensors(path / MODEL).items():
            total[name] = total[name] + tensor.double() if name in total else tensor.double()
    dtypes = {name: tensor.dtype for name, tensor in read_tensors(found[-1] / MODEL).items()}
    out.mkdir(parents=True)
    save_tensors({name: (tensor / n).to(dtypes[name]) for name, tensor in total.items()}, out / MODEL)
    for name in (CONFIG, TOKENIZER):
        if (folder / name).is_file():
            write_whole(out / name, (folder / name).read_bytes())
    return found[-n:]
