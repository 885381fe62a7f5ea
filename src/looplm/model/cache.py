"""Preallocated key/value cache: one pair of tensors per slot, a slot per (loop_idx, layer_idx).

Each row of the batch has its own length, kept by the caller: keys beyond a row's length are never attended to, because
attention masks by position. That is what lets prompts of different lengths share a batch without padding on the left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Slot:
    """What one layer keeps in one loop, two tensors (B, heads, T_max, width): keys and values, or for latent attention
    the latents and the shared keys."""

    keys: Tensor
    values: Tensor

    def write(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Store (B, H_kv, T, K) at positions (B, T), in place."""
        index = positions[:, None, :, None]
        self.keys.scatter_(2, index.expand(keys.shape), keys.to(self.keys.dtype))
        self.values.scatter_(2, index.expand(values.shape), values.to(self.values.dtype))


class KVCache:
    """All slots of one batch. `n_slots` is `LoopedLM.n_slots(n_loops)`, `shapes` the attention's `slot_shapes`."""

    def __init__(
        self,
        *,
        n_slots: int,
        batch_size: int,
        capacity: int,
        shapes: tuple[tuple[int, int], tuple[int, int]],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.capacity = capacity

        def empty(heads: int, width: int) -> Tensor:
            return torch.zeros(batch_size, heads, capacity, width, dtype=dtype, device=device)

        self.slots = [Slot(*(empty(*shape) for shape in shapes)) for _ in range(n_slots)]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows of the batch: finished sequences stop costing anything."""
        for slot in self.slots:
            slot.keys, slot.values = slot.keys[rows], slot.values[rows]
