"""Losses: the cross-entropy of the scored positions, and what may be added to it."""

import math

import pytest
import torch

from conftest import tiny_config
from copying import Copying
from looplm.data.pack import IGNORE, Batch
from looplm.errors import ConfigError
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM
from looplm.train.losses import ExitGateConfig, LoopLossConfig, StateLossConfig, exit_gate_loss, next_token_loss
from looplm.train.run import resolve_run


def test_the_loss_is_cross_entropy_of_the_scored_positions() -> None:
    model, batch = LoopedLM(tiny_config()), Copying().batch(0)
    logits = model(batch.ids, n_loops=3).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE)
    torch.testing.assert_close(next_token_loss(model, batch, LoopPlan(3)), expected)


@pytest.mark.parametrize(("weights", "expected"), [("uniform", (0.5, 0.5)), ("linear", (1 / 3, 2 / 3))])
def test_loop_loss_weighs_the_earlier_loops(weights: str, expected: tuple[float, float]) -> None:
    model, batch = LoopedLM(tiny_config("inject.kind=diagonal")), Copying().batch(0)
    losses = [next_token_loss(model, batch, LoopPlan(n)) for n in (1, 2, 3)]
    wanted = 0.7 * losses[2] + 0.3 * (expected[0] * losses[0] + expected[1] * losses[1])
    loop_loss = LoopLossConfig(share=0.3, weights=weights)  # type: ignore[arg-type]
    found = next_token_loss(model, batch, LoopPlan(3), loop_loss=loop_loss)
    torch.testing.assert_close(found, wanted)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for one, two in zip(torch.autograd.grad(found, parameters), torch.autograd.grad(wanted, parameters), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_loop_loss_takes_loops_with_gradient_only() -> None:
    model, batch = LoopedLM(tiny_config()), Copying().batch(0)
    losses = [next_token_loss(model, batch, LoopPlan(n)) for n in (3, 4)]
    found = next_token_loss(model, batch, LoopPlan(4, n_grad=2), loop_loss=LoopLossConfig(share=0.5))
    torch.testing.assert_close(found, 0.5 * (losses[0] + losses[1]))
    one = next_token_loss(model, batch, LoopPlan(4, n_grad=1), loop_loss=LoopLossConfig(share=0.5))
    torch.testing.assert_close(one, losses[1])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.plan={kind: poisson, mean: 2}"], "kind poisson ends them apart"),
        (["model.exit={kind: act}"], "leave one of them out"),
        (["model.backout=true"], "leave one of them out"),
    ],
)
def test_loop_loss_is_refused_where_it_means_nothing(
    tiny_reason: list[str], overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_run("reason", overrides=[*tiny_reason, "train.loop_loss={share: 0.3}", *overrides])


def test_the_jacobian_penalty_is_that_of_one_more_loop() -> None:
    """Against the Jacobian itself: |J v|^2 / |v|^2, the mean over the state's entries of v drawn from a unit normal."""
    torch.manual_seed(0)
    model = LoopedLM(tiny_config("n_prelude=0", "n_coda=0", "inject.kind=diagonal")).double()
    ids = torch.randint(0, 40, (1, 3))
    batch, config = Batch(ids, ids.roll(-1, dims=1)), StateLossConfig(jacobian=0.5)
    plain = next_token_loss(model, batch, LoopPlan(2))
    added = next_token_loss(model, batch, LoopPlan(2), state_loss=config, seed=5) - plain
    x, inputs = model.enter(ids, None, positions=None, n_keys=None, documents=None, before=None, asides=None)
    entry, states = model.inject.prepare(x), []
    model.run_core(x, plan=LoopPlan(2), inputs=inputs, states=states)

    def one_more(state: torch.Tensor) -> torch.Tensor:
        return model.one_loop(state, entry, torch.tensor(2), inputs)[0]

    with torch.no_grad():
        jacobian = torch.autograd.functional.jacobian(one_more, states[-1].detach()).reshape(48, 48)
    v = torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(5)).double().flatten()
    assert float(added.detach()) == pytest.approx(0.5 * float((jacobian @ v).square().mean()), rel=0.05)
    other = next_token_loss(model, batch, LoopPlan(2), state_loss=config, seed=6) - plain
    assert float(other.detach()) != pytest.approx(float(added.detach()), rel=1e-4)


@pytest.mark.parametrize("penalty", [StateLossConfig(jacobian=10.0), StateLossConfig(norm=1.0)])
def test_penalties_of_the_state_lower_what_they_penalise(penalty: StateLossConfig) -> None:
    batch, plan = Copying().batch(0), LoopPlan(3)

    def penalised(model: LoopedLM, *, seed: int) -> float:
        with_it = next_token_loss(model, batch, plan, state_loss=penalty, seed=seed)
        return float((with_it - next_token_loss(model, batch, plan)).detach())

    def after_training(state_loss: StateLossConfig | None) -> float:
        torch.manual_seed(0)
        model = LoopedLM(tiny_config("n_prelude=0", "n_coda=0", "inject.kind=add"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(60):
            optimizer.zero_grad()
            next_token_loss(model, batch, plan, state_loss=state_loss, seed=step).backward()
            optimizer.step()
        return penalised(model, seed=100)

    assert after_training(penalty) < 0.7 * after_training(None)


def test_the_gate_s_loss_is_the_losses_of_the_loops_by_where_tokens_leave() -> None:
    """Written out for every token from the states of a plain forward."""
    torch.manual_seed(0)
    model, batch = LoopedLM(tiny_config("inject.kind=diagonal", "exit.kind=gate")), Copying().batch(0)
    states: list[torch.Tensor] = []
    model.hidden(batch.ids, plan=LoopPlan(3), states=states)
    scored = (batch.targets != IGNORE).nonzero().tolist()
    with torch.no_grad():
        losses = [model(batch.ids, n_loops=n).logits.log_softmax(-1) for n in (1, 2, 3)]
    total, stage_two = 0.0, 0.0
    for row, token in scored:
        by_loop = [-float(each[row, token, batch.targets[row, token]]) for each in losses]
        done = [float(model.exit.done(state)[row, token].detach()) for state in states]  # type: ignore[index]
        leaves = [done[0], (1 - done[0]) * done[1], (1 - done[0]) * (1 - done[1])]
        assert sum(leaves) == pytest.approx(1)
        entropy = -sum(p * math.log(p) for p in leaves)
        total += sum(p * loss for p, loss in zip(leaves, by_loop, strict=True)) - 0.1 * entropy
        for loop in (1, 2):
            gain = max(0.0, by_loop[loop - 1] - by_loop[loop])
            wanted = 1 / (1 + math.exp(-50 * (gain - 0.005)))
            stage_two -= wanted * math.log(1 - done[loop]) + (1 - wanted) * math.log(done[loop])
    config = ExitGateConfig(entropy=0.1)
    first = exit_gate_loss(model, batch, LoopPlan(3), config, alone=False)
    assert float(first.detach()) == pytest.approx(total / len(scored), rel=1e-4)
    first.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.zero_grad()
    second = exit_gate_loss(model, batch, LoopPlan(3), config, alone=True)
    assert float(second.detach()) == pytest.approx(stage_two / 2 / len(scored), rel=1e-4)
    second.backward()
    assert {name for name, each in model.named_parameters() if each.grad is not None} == {
        "exit.gate.weight",
        "exit.gate.bias",
    }


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.exit_gate={}"], "set both or neither"),
        (["model.exit.kind=gate"], "set both or neither"),
        (["model.exit.kind=gate", "train.exit_gate={}", "train.loop_loss={share: 0.3}"], "its own loss"),
        (["model.exit.kind=gate", "train.exit_gate={}", "train.plan={kind: poisson, mean: 2}"], "all loops"),
        (["model.exit.kind=gate", "train.exit_gate={}", "model.backout=true"], "backout"),
    ],
)
def test_a_gate_is_refused_where_it_means_nothing(tiny_reason: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_run("reason", overrides=[*tiny_reason, *overrides])
