"""Losses. The label shift is done where batches are made (data.pack), so every loss takes targets as they are.

A step may be made of several micro-batches, on several ranks. Its loss is a mean over all of them, so each of them is
weighed by its `Share`: what is a mean over scored tokens (cross-entropy, the gate's loss) by its share of the step's
scored tokens, and what is a mean over all positions (the state's loss, router balance, ponder cost) by its share of the
positions. The step's loss and gradient are then those of one batch of all rows; only a router's balance, which is no
mean, and the random direction of the Jacobian penalty depend on the split.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from looplm.config import Config, NonNegativeFloat, Number
from looplm.data.pack import IGNORE, Batch
from looplm.errors import DataError
from looplm.model.layer_inputs import Asides, LayerInputs
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM

JACOBIAN_STEP = 1e-2  # of the state's size
GAIN_SHARPNESS, LEAST_GAIN = 50.0, 0.005  # per nat; nats that make a loop worth running


@dataclass(frozen=True)
class Share:
    """What a micro-batch counts for in the step that it is a part of."""

    scored: float = 1.0
    """Of the step's scored tokens; 0 for a batch without any."""
    positions: float = 1.0
    """Of all its positions, padding included."""


class LoopLossConfig(Config):
    """A share of the loss for the states after the earlier loops, each read out as if it were the last: fewer loops
    than were trained then still answer. Costs coda and head once more per loop; logits are kept for none of them."""

    share: Number = Field(gt=0, lt=1)
    """Share of the whole loss, for all earlier loops together."""
    weights: Literal["uniform", "linear"] = "uniform"
    """How the share is split: alike, or in proportion to the loop's number."""


class StateLossConfig(Config):
    """What is added to the loss to keep the state small, and to keep one more loop from moving it."""

    jacobian: NonNegativeFloat = 0.0
    """Weight of |J v|^2 / |v|^2 for a random v, J the Jacobian of one more loop at the last state (STARS, 2026): below
    1 on average, loops bring states together. Costs two more loops, in fp32."""
    norm: NonNegativeFloat = 0.0
    """Weight of the last state's mean square, over all positions, scored or not: all of them feed later tokens."""


class ExitGateConfig(Config):
    """How a learned exit gate is trained (Ouro, 2025), in two stages. First together with the model: the loss of each
    loop's output, weighted by the probability that the token leaves there, minus `entropy` times the entropy of these
    probabilities. Then alone, with the model frozen: a token should continue where the last loop gained something."""

    entropy: NonNegativeFloat = 0.05
    """Weight of the entropy, which keeps the gate from collapsing onto one loop while the model learns."""
    alone: Number = Field(default=0.2, ge=0, lt=1)
    """Share of the budget, its end, in which the gate is trained alone."""


def exit_gate_loss(
    model: LoopedLM,
    batch: Batch,
    plan: LoopPlan,
    config: ExitGateConfig,
    *,
    alone: bool,
    share: Share | None = None,
    loads: list[tuple[int, Tensor]] | None = None,
) -> Tensor:
    """The loss of a model with a learned gate, of its first stage or with `alone` of its second, weighed by `share`.
    Costs coda and head once per loop. In the first stage the routers' loads are appended to `loads`.

    Raises:
        DataError: no position is scored, and `share` is not given.
    """
    asides = Asides()
    with torch.set_grad_enabled(torch.is_grad_enabled() and not alone):
        unrolled = _unroll(model, batch, plan, asides=asides)
    if loads is not None and not alone:
        loads.extend(asides.loads)
    index, share = _scored(batch, share), share or Share()
    targets = batch.targets.flatten()[index]

    def losses(hidden: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(hidden)[:, : model.config.n_targets], targets, reduction="none")

    scored = [hidden.flatten(0, 1)[index] for hidden in unrolled.hidden]
    with torch.set_grad_enabled(torch.is_grad_enabled() and not alone):
        each = [checkpoint(losses, rows, use_reentrant=False) for rows in scored]
    by_loop = torch.stack(each)  # (loops, N) nats
    done = torch.stack([_done(model, state.flatten(0, 1)[index]) for state in unrolled.states])
    if alone:
        gain = (by_loop[:-1] - by_loop[1:]).clamp(min=0)
        goes_on = torch.sigmoid(GAIN_SHARPNESS * (gain - LEAST_GAIN))
        with torch.autocast(done.device.type, enabled=False):  # refused under it on a GPU, though all is fp32
            # the mean of nothing would be NaN, the sum is 0
            how = "mean" if len(index) else "sum"
            loss = (
                F.binary_cross_entropy(1 - done[1:], goes_on.float(), reduction=how)
                if len(done) > 1
                else 0 * done.sum()
            )
            return share.scored * loss
    left = torch.cat((torch.ones_like(done[:1]), (1 - done[:-1]).cumprod(0)))
    leaves = torch.cat((left[:-1] * done[:-1], left[-1:]))  # the last loop takes what is left
    entropy = -(leaves * leaves.clamp(min=1e-9).log()).sum(0)
    expected = (leaves * by_loop).sum(0)
    loss = share.scored * (expected.mean() - config.entropy * entropy.mean() if len(index) else expected.sum())
    return loss + share.positions * torch.stack(asides.losses).sum() if asides.losses else loss


def _done(model: LoopedLM, state: Tensor) -> Tensor:
    done = model.exit.done(state)
    assert done is not None, "refused by RunConfig"
    return done


def _scored(batch: Batch, share: Share | None) -> Tensor:
    """Indices of the scored positions, counted through all rows; none in some parts of a step."""
    index = torch.nonzero(batch.targets.flatten() != IGNORE).squeeze(1)
    if not len(index) and share is None:
        raise DataError("no position of this batch is scored, so there is nothing to learn from it: longer rows?")
    return index


def next_token_loss(
    model: LoopedLM,
    batch: Batch,
    plan: LoopPlan,
    *,
    label_smoothing: float = 0.0,
    loop_loss: LoopLossConfig | None = None,
    state_loss: StateLossConfig | None = None,
    seed: int = 0,
    share: Share | None = None,
    loads: list[tuple[int, Tensor]] | None = None,
) -> Tensor:
    """Mean cross-entropy over the scored positions, nats, plus what the model's parts ask for (router balance, ponder
    cost), each weighed by `share`. The head runs on the scored positions only. With `loop_loss`, of the earlier loops
    that carry gradient too; with `state_loss`, what it adds, in a random direction that `seed` decides. The routers'
    loads are appended to `loads`.

    Raises:
        DataError: no position is scored, and `share` is not given.
    """
    asides = Asides()
    unrolled: _Unrolled | None = None
    if loop_loss is None and state_loss is None:
        hidden = [model.hidden(batch.ids, plan=plan, documents=batch.documents, asides=asides)]
    else:
        unrolled = _unroll(model, batch, plan, asides=asides)
        hidden = unrolled.hidden if loop_loss is not None else unrolled.hidden[-1:]
    if loads is not None:
        loads.extend(asides.loads)
    index, share = _scored(batch, share), share or Share()

    def cross_entropy(hidden: Tensor) -> Tensor:
        rows, targets = hidden.flatten(0, 1), batch.targets.flatten()
        if len(index) < len(targets):
            rows, targets = rows.index_select(0, index), targets.index_select(0, index)
        return model.cross_entropy(rows, targets, label_smoothing=label_smoothing)

    loss = cross_entropy(hidden.pop())
    if loop_loss is not None and hidden:
        weights = [loop if loop_loss.weights == "linear" else 1 for loop in range(1, len(hidden) + 1)]
        earlier = [weight / sum(weights) * cross_entropy(each) for weight, each in zip(weights, hidden, strict=True)]
        loss = (1 - loop_loss.share) * loss + loop_loss.share * torch.stack(earlier).sum()
    loss = share.scored * loss
    if unrolled is not None and state_loss is not None:
        loss = loss + share.positions * _of_state(model, unrolled, state_loss, loop_idx=plan.n_loops, seed=seed)
    return loss + share.positions * torch.stack(asides.losses).sum() if asides.losses else loss


@dataclass(frozen=True)
class _Unrolled:
    """A forward with its intermediate tensors, each (B, T, D)."""

    inputs: LayerInputs
    entry: Tensor  # what every loop takes in
    states: list[Tensor]  # after each loop
    hidden: list[Tensor]  # what coda and norm make of the states that carry gradient, the last one last


def _unroll(model: LoopedLM, batch: Batch, plan: LoopPlan, *, asides: Asides) -> _Unrolled:
    assert plan.per_row is None, "refused by TrainConfig"
    x, inputs = model.enter(
        batch.ids, None, positions=None, n_keys=None, documents=batch.documents, before=None, asides=asides
    )
    states: list[Tensor] = []
    last = model.run_core(x, plan=plan, inputs=inputs, states=states)
    earlier = [state for loop_idx, state in enumerate(states[:-1]) if plan.carries_gradient(loop_idx)]
    hidden = [model.leave(state, inputs, None) for state in (*map(model.inject.read_out, earlier), last)]
    return _Unrolled(inputs, model.inject.prepare(x), states, hidden)


def _of_state(model: LoopedLM, unrolled: _Unrolled, config: StateLossConfig, *, loop_idx: int, seed: int) -> Tensor:
    """What `config` adds to the loss."""
    loss = config.norm * unrolled.states[-1].float().square().mean()
    if not config.jacobian:
        return loss
    # by a finite difference: the backward pass written for attention has no derivative. In the weights' type: bf16
    # would round it away
    inputs = replace(unrolled.inputs, asides=None)
    number = torch.full_like(inputs.loop_idx, loop_idx)
    state, entry = (tensor.to(model.embed.weight.dtype) for tensor in (unrolled.states[-1], unrolled.entry))
    direction = torch.randn(state.shape, generator=torch.Generator().manual_seed(seed)).to(state)
    step = JACOBIAN_STEP * state.detach().square().mean().sqrt()
    with torch.autocast(state.device.type, enabled=False):
        here, there = (model.one_loop(at, entry, number, inputs)[0] for at in (state, state + step * direction))
    return loss + config.jacobian * ((there - here) / step).square().mean()
