"""Preallocated key/value cache: one pair of tensors per slot, a slot per (loop_idx, layer_idx).

Each row of the batch has its own length, kept by the caller. Keys beyond a row's length are never attended to, because
attention masks by position; so prompts of different lengths share a batch without padding on the left.

Tokens whose output was settled before the last loop are deferred: their state is kept, and their keys of the deeper
loops are computed from it if a later token runs these loops and needs them.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from looplm.model.layer_inputs import LayerInputs


@dataclass
class Slot:
    """What one layer keeps in one loop, two tensors (B, heads, T_max, width): keys and values, or for latent attention
    the latents and the shared keys."""

    keys: Tensor
    values: Tensor

    def write(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
        """Store (B, H_kv, T, K) at positions (B, T), in place."""
        rows = self._rows(positions)[:, None, None]
        for kept, new in ((self.keys, keys), (self.values, values)):
            heads = torch.arange(kept.shape[1], device=kept.device)[:, None]
            kept.index_put_((rows, heads, positions[:, None]), new.to(kept.dtype))  # compiled, a scatter copies it all

    def read(self, n_keys: int | None) -> tuple[Tensor, Tensor]:
        """Both tensors up to position n_keys."""
        return self.keys[:, :, :n_keys], self.values[:, :, :n_keys]

    def _rows(self, positions: Tensor) -> Tensor:
        return torch.arange(len(positions), device=positions.device)


@dataclass
class SlotRows(Slot):
    """Some rows of a slot, written in place; reading copies what is read."""

    rows: Tensor  # (R,)

    def read(self, n_keys: int | None) -> tuple[Tensor, Tensor]:
        keys, values = super().read(n_keys)
        return keys.index_select(0, self.rows), values.index_select(0, self.rows)

    def _rows(self, positions: Tensor) -> Tensor:
        return self.rows


@dataclass
class Behind:
    """Deferred tokens: their state before a loop that they have not run, and what else that loop takes, each (B, T) or
    (B, T, D)."""

    ids: Tensor
    positions: Tensor
    first: Tensor
    entry: Tensor
    state: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> "Behind":
        """`change` applied to every tensor."""
        return Behind(*(change(getattr(self, field.name)) for field in fields(self)))

    def put(self, rows: Tensor, new: "Behind", *, n_keys: int | None = None) -> None:
        """The first `n_keys` tokens of `new`, all if None, in these rows, in place."""
        for field in fields(self):
            getattr(self, field.name)[rows, :n_keys] = getattr(new, field.name)[:, :n_keys]


def left_behind(inputs: LayerInputs, entry: Tensor, state: Tensor) -> Behind:
    """The tokens of a cached forward, deferred with their state as it is now."""
    assert inputs.positions is not None
    assert inputs.first is not None
    return Behind(inputs.ids, inputs.positions, inputs.first, entry, state)


def side_by_side(groups: Sequence[Behind]) -> Behind:
    """All groups as one, in their order."""
    return Behind(*(torch.cat([getattr(group, field.name) for group in groups], dim=1) for field in fields(Behind)))


def live(tokens: Behind, *, scratch: int) -> Behind:
    """The tokens that are not at position `scratch`, in their order. Rows stay equally wide: the row with most such
    tokens decides."""
    is_gone = tokens.positions == scratch
    n_live = int((~is_gone).sum(1).max())
    order = is_gone.to(torch.int8).argsort(dim=1, stable=True)[:, :n_live]
    each_row = torch.arange(len(order), device=order.device)[:, None]
    return tokens.each(lambda tensor: tensor[each_row, order])


def join(groups: Sequence[Behind], *, scratch: int) -> Behind:
    """All groups side by side, the newest last. Padding after a short prompt has the position of a token that came
    later. It is moved to the position `scratch`, which no query reads."""
    joint = side_by_side(groups)
    number = torch.arange(joint.positions.shape[1], device=joint.positions.device).expand_as(joint.positions)
    newest = number.new_zeros(len(number), scratch + 1).scatter_reduce(1, joint.positions, number, "amax")
    joint.positions = torch.where(newest.gather(1, joint.positions) == number, joint.positions, scratch)
    return joint


class KVCache:
    """All slots of one batch, each with one position beyond `capacity`: `scratch`."""

    def __init__(self, slots: list[Slot], *, capacity: int) -> None:
        self.slots, self.capacity = slots, capacity
        self.behind: defaultdict[int, list[Behind]] = defaultdict(list)  # by the loop that they have not run

    def take_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; a row may occur more than once. Rows left out cost nothing
        more."""
        for slot in self.slots:
            slot.keys, slot.values = slot.keys[rows], slot.values[rows]
        for groups in self.behind.values():
            groups[:] = [group.each(lambda tensor: tensor[rows]) for group in groups]

    def put(self, rows: Tensor, new: "KVCache", *, n_keys: int) -> None:
        """Write the first `n_keys` positions of `new` into these rows. What the rows hold beyond stays: no query reads
        it before its own sequence has written over it."""
        for slot, other in zip(self.slots, new.slots, strict=True):
            slot.keys[rows, :, :n_keys] = other.keys[:, :, :n_keys]
            slot.values[rows, :, :n_keys] = other.values[:, :, :n_keys]
        n_rows = len(self.slots[0].keys)
        for loop_idx in {*self.behind, *new.behind}:
            groups = self.behind[loop_idx]
            for group in groups:
                group.positions = group.positions.index_fill(0, rows, self.capacity)  # their sequences ended
            for group in new.behind.get(loop_idx, []):
                wide = group.each(lambda tensor: tensor.new_zeros(n_rows, *tensor.shape[1:]))
                wide.positions.fill_(self.capacity)
                wide.put(rows, group)
                groups.append(wide)
            if groups:
                tokens = live(side_by_side(groups), scratch=self.capacity)
                groups[:] = [tokens] if tokens.positions.shape[1] else []
