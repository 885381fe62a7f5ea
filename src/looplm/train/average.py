"""Averages of weights: over the steps of a run (an exponential moving average), or over its last checkpoints."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from looplm.checkpoint import (
    CONFIG,
    MODEL,
    checkpoints,
    damage_of,
    mismatches,
    new_folder,
    own_tensors,
    read_tensors,
    reading_from,
    run_folder,
    save_tensors,
)
from looplm.data.bpe import TOKENIZER
from looplm.dist import local
from looplm.errors import CheckpointError, ConfigError
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
        CheckpointError: one of them is damaged, or of another model than the newest.
        ConfigError: there are fewer, or `out` exists.
    """
    folder = run_folder(run)
    found = checkpoints(folder)
    if not 2 <= n <= len(found):
        raise ConfigError(f"{str(run)!r} has {len(found)} checkpoints, and an average takes 2 or more, not {n}")
    if out.exists():
        raise ConfigError(f"{str(out)!r} exists; give a new folder")
    with new_folder(out) as place:
        save_tensors(_mean(folder, found[-n:]), place / MODEL)
        for name in (CONFIG, TOKENIZER):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, place / name)
    return found[-n:]


def _mean(folder: Path, taken: list[Path]) -> dict[str, Tensor]:
    """The mean of the weights of these checkpoints of a run, summed in fp64, in the types of the newest."""
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for path in taken:
        with reading_from(folder, path, damage_of(path)):
            tensors = read_tensors(path / MODEL)
            problems = mismatches({name: tensor.shape for name, tensor in total.items()}, tensors) if total else []
            if problems:
                raise CheckpointError(f"{path / MODEL} is not of the model of {taken[0].name}: {'; '.join(problems)}")
        dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
        total = {name: total.get(name, 0) + tensor.double() for name, tensor in tensors.items()}
    return {name: (tensor / len(taken)).to(dtypes[name]) for name, tensor in total.items()}
