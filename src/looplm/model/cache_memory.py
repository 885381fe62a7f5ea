"""The memory of a machine, and whether a cache fits it, asked before any of the cache is allocated."""

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from looplm.errors import ConfigError
from looplm.model.compiler import TURNS

if TYPE_CHECKING:
    from looplm.model.looped import LoopedLM

CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes(device: str = "cpu") -> int:
    """All memory of the machine that this process may use, or of its GPU."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory)
    found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in CGROUP_LIMITS:
        with suppress(OSError, ValueError):  # not there, or `max`
            found.append(int(Path(path).read_text(encoding="ascii")))
    return min(found)


def cache_bytes(model: "LoopedLM", *, batch_size: int, capacity: int, n_loops: int) -> int:
    """Bytes of keys and values of `batch_size` rows of `capacity` tokens."""
    width = sum(heads * width for heads, width in model.config.block.attention.slot_shapes)
    return model.n_slots(n_loops) * width * model.embed.weight.itemsize * batch_size * capacity


@TURNS.forward()
def check_cache_fits(model: "LoopedLM", *, batch_size: int, capacity: int, n_loops: int) -> None:
    """Refuse a cache larger than the memory of the model's device.

    Raises:
        ConfigError: it is.
    """
    needed = cache_bytes(model, batch_size=batch_size, capacity=capacity, n_loops=n_loops)
    available = memory_bytes(model.embed.weight.device.type)
    if needed > available:
        texts = "text" if batch_size == 1 else "texts"
        raise ConfigError(
            f"the keys and values of {batch_size:,} {texts} of {capacity:,} tokens take {needed // 10**6:,} MB with "
            f"{n_loops:,} loops, and there are {available // 10**6:,} MB of memory: give fewer loops, fewer new tokens "
            "or a smaller batch size"
        )
