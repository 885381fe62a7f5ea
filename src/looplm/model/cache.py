"""Preallocated key/value cache: one pair of tensors per slot, a slot per (loop_idx, layer_idx).

Each row of the batch has its own length, kept by the caller: keys beyond a row's length are never attended to, because
attention masks by position. That is what lets prompts of different lengths share a batch without padding on the left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Slot:
    """Keys and values of one layer in one loop: (B, H_kv, T_max, K) each."""

    keys: Tensor
    values: Tensor

    def write(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Store (B, H_kv, T, K) at positions (B, T), in place."""
        index = positions[:, None, :, None].expand(keys.shape)
        self.keys.scatter_(2, index, keys.to(self.keys.dtype))
        self.values.scatter_(2, index, values.to(self.values.dtype))


class KVCache:
    """All slots of one batch. `n_slots` is `LoopedLM.n_slots(n_loops)`."""

    def __init__(
        self,
        *,
        n_slots: int,
        batch_size: int,
        n_kv_heads: int,
        capacity: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (batch_size, n_kv_heads, capacity, head_dim)
        self.capacity = capacity
        self.slots = [
            Slot(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))
            for _ in range(n_slots)
        ]

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows of the batch: finished sequences stop costing anything."""
        for slot in self.slots:
            slot.keys, slot.values = slot.keys[rows], slot.values[rows]
