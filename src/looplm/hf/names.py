"""Tensor names without what torch.compile, DDP, FSDP and activation checkpointing put between their parts."""

from collections.abc import Mapping

import torch
from torch import Tensor

from looplm.errors import CheckpointError

# parts of a name that stand for a module wrapped round another; no system calls a part so
WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names that they have in the model itself, whatever it was wrapped in, in any order and depth.

    Raises:
        CheckpointError: two names become one, and their tensors differ.
    """
    found: dict[str, Tensor] = {}
    before: dict[str, str] = {}
    for name, tensor in state.items():
        plain = ".".join(part for part in name.split(".") if part not in WRAPPERS) or name
        if plain in found and not _equal(found[plain], tensor):
            raise CheckpointError(
                f"{before[plain]} and {name} are one tensor under two names, and differ; leave one of them out"
            )
        found[plain], before[plain] = tensor, name
    return found


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
