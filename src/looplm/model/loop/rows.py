"""Loops by row: every row of a batch runs its own number of loops and then leaves the batch (Parcae, 2026, whose code
lets finished rows run on and discards the result).

Rows never see each other, so a row's state is what it would be alone. At every loop the rows that carry gradient run
apart from the rows that do not carry it yet. Shapes: B rows of the batch, T tokens, D width, R rows that run.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from looplm.model.layer_inputs import Asides, LayerInputs
from looplm.model.loop.plan import LoopPlan

# (state (R, T, D) or None at first, entry (R, T, D), loop_idx, inputs) to the next state and auxiliary outputs
OneLoop = Callable[[Tensor | None, Tensor, Tensor, LayerInputs], tuple[Tensor, Asides | None]]


def run_rows(
    one_loop: OneLoop, entry: Tensor, *, plan: LoopPlan, inputs: LayerInputs, states: list[Tensor] | None
) -> Tensor:
    """The state (B, T, D) after every row's own number of loops; the state after each loop is appended to `states`."""
    assert plan.per_row is not None
    tracking = torch.is_grad_enabled()
    state: Tensor | None = None
    for loop_idx in range(plan.n_loops):
        number = torch.full_like(inputs.loop_idx, loop_idx)
        ran: list[tuple[Tensor, Tensor]] = []
        groups = _groups(plan, loop_idx, tracking=tracking)
        n_running = sum(map(len, groups.values()))
        for carries_gradient, rows in groups.items():
            if not rows:
                continue
            index = torch.tensor(rows, device=entry.device)
            with torch.set_grad_enabled(carries_gradient):
                before = None if state is None else state.index_select(0, index)
                after, asides = one_loop(before, entry.index_select(0, index), number, inputs.rows(index))
            ran.append((index, after))
            if inputs.asides is not None and asides is not None:
                # a router's loss is a mean over the tokens of its call: the two calls are weighted to make one mean
                asides.losses = [loss * (len(rows) / n_running) for loss in asides.losses]
                inputs.asides.extend(asides)
        state = _placed(state, ran)
        if states is not None:
            states.append(state)
    assert state is not None
    return state


def _groups(plan: LoopPlan, loop_idx: int, *, tracking: bool) -> dict[bool, list[int]]:
    """The rows that run this loop, by whether it carries gradient."""
    assert plan.per_row is not None
    groups: dict[bool, list[int]] = {False: [], True: []}
    for row, n_loops in enumerate(plan.per_row):
        if loop_idx < n_loops:
            groups[tracking and plan.carries_gradient(loop_idx, n_loops=n_loops)].append(row)
    return groups


def _placed(state: Tensor | None, ran: list[tuple[Tensor, Tensor]]) -> Tensor:
    """`state` with the rows that ran replaced; at the first loop there is no state and all rows ran."""
    if state is None:
        order = torch.cat([index for index, _ in ran])
        return torch.cat([after for _, after in ran]).index_select(0, order.argsort())
    for index, after in ran:
        state = state.index_copy(0, index, after)
    return state
