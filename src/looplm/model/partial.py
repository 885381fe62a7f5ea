"""The cached forward in two parts, for tokens that need not all run the same loops: the first loops of new tokens, and
later ones of any tokens that have run those before.

Shapes: B texts, T new tokens, R of the texts, W tokens of each, D width.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from looplm.model.cache import Behind, KVCache, Slot, SlotRows
from looplm.model.layer_inputs import LayerInputs

if TYPE_CHECKING:
    from looplm.model.looped import LoopedLM


class Ran(NamedTuple):
    """What is known of tokens (B, T) after the last of some loops."""

    change: Tensor
    """Relative change of the state by that loop, (B, T)."""
    done: Tensor | None
    """What a learned gate says of it, (B, T)."""
    hidden: Tensor | None
    """What comes of it, (B, T, D); None where a coda has to run for that."""


def begin(
    model: "LoopedLM",
    ids: Tensor,
    *,
    n_loops: int,
    cache: KVCache,
    tokens: Behind,
    positions: Tensor,
    n_keys: int,
    before: Tensor | None,
) -> Ran:
    """Prelude and the first `n_loops` for ids (B, T) at `positions`. What later loops need is put into `tokens`, each
    (B, places) or (B, places, D)."""
    x, inputs = model.enter(
        ids,
        cache.slots[: model.config.n_prelude],
        positions=positions,
        n_keys=n_keys,
        documents=None,
        before=before,
        asides=None,
    )
    entry = model.inject.prepare(x)
    old: Tensor | None = None
    state: Tensor | None = None
    for loop_idx in range(n_loops):
        number, old = torch.full_like(inputs.loop_idx, loop_idx), state
        state, _ = model.one_loop(old, entry, number, inputs, core_slots(model, cache, loop_idx))
    assert state is not None
    assert inputs.first is not None
    at = (torch.arange(len(ids), device=ids.device)[:, None], positions)
    for kept, new in ((tokens.ids, ids), (tokens.first, inputs.first), (tokens.entry, entry), (tokens.state, state)):
        kept.index_put_(at, new)
    return _ran(model, old, state, inputs)


def go_on(
    model: "LoopedLM",
    at: Tensor,
    *,
    first: int,
    n_loops: int,
    cache: KVCache,
    tokens: Behind,
    n_keys: int,
    rows: Tensor | None = None,
) -> Ran:
    """Loops number `first` up to `n_loops` for the tokens at places (R, W) of the texts `rows` (R,), or of all."""
    each = torch.arange(len(at), device=at.device) if rows is None else rows
    here = tokens.each(lambda tensor: tensor[each[:, None], at])
    inputs = model.inputs(here.ids, positions=at, n_keys=n_keys)
    inputs.first = here.first
    old, state = here.state, here.state
    for loop_idx in range(first, n_loops):
        number, old = torch.full_like(inputs.loop_idx, loop_idx), state
        state, _ = model.one_loop(old, here.entry, number, inputs, core_slots(model, cache, loop_idx, rows=rows))
    tokens.state.index_put_((each[:, None], at), state)
    return _ran(model, old, state, inputs)


def _ran(model: "LoopedLM", old: Tensor | None, state: Tensor, inputs: LayerInputs) -> Ran:
    hidden = None if model.config.n_coda else model.leave(model.inject.read_out(state), inputs, [])
    return Ran(relative_change(old, state), model.exit.done(state), hidden)


def core_slots(model: "LoopedLM", cache: KVCache, loop_idx: int, *, rows: Tensor | None = None) -> list[Slot]:
    """The slots of one loop, of all texts or of `rows`."""
    start = model.config.n_prelude + loop_idx * model.config.n_core
    return slots_of(cache.slots[start : start + model.config.n_core], rows=rows)


def coda_slots(model: "LoopedLM", cache: KVCache, *, rows: Tensor | None = None) -> list[Slot]:
    """The slots of the coda, of all texts or of `rows`."""
    return slots_of(cache.slots[len(cache.slots) - model.config.n_coda :], rows=rows)


def slots_of(slots: list[Slot], *, rows: Tensor | None) -> list[Slot]:
    """These slots, or only `rows` of them."""
    return slots if rows is None else [SlotRows(slot.keys, slot.values, rows) for slot in slots]


def relative_change(before: Tensor | None, after: Tensor) -> Tensor:
    """|after - before| / |after| over the last dimension, in fp32; infinite where there was nothing before."""
    if before is None:
        return torch.full(after.shape[:-1], torch.inf, device=after.device)
    return (after - before).float().norm(dim=-1) / after.float().norm(dim=-1).clamp(min=1e-12)
