"""Exit rules and continuous depth batching: full depth where nothing exits, batched = single, and the rules by hand."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import VARIANTS, crossed, tiny_config
from looplm.errors import ConfigError, DataError, LooplmError
from looplm.infer.depth import score_sequences
from looplm.infer.exits import KINDS, ExitRule
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM

LENGTHS = (1, 5, 9, 2, 7, 3, 8)
N_LOOPS = (3, 4, 1, 5, 2, 4, 3)
NEVER = ExitRule("latent", 0)


def sequences(model: LoopedLM) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(model.config.vocab_size, (length,), generator=generator) for length in LENGTHS]


def can_exit(name: str) -> bool:
    config = tiny_config(*VARIANTS[name])
    return config.exit.kind == "none" and not config.backout


EXITING = [name for name in VARIANTS if can_exit(name)]
Make = Callable[..., LoopedLM]


@pytest.mark.parametrize("name", EXITING)
def test_a_rule_that_never_fires_is_full_depth(name: str, make_model: Make) -> None:
    model = make_model(*VARIANTS[name], "exit.kind=gate")
    ids = sequences(model)
    for rule in (NEVER, *(ExitRule(kind, 0) for kind in KINDS[1:])):
        scored = score_sequences(model, ids, n_loops=N_LOOPS, rule=rule, batch_size=3)
        for sequence, n_loops, result in zip(ids, N_LOOPS, scored, strict=True):
            whole = model(sequence[None], n_loops=n_loops).logits[0]
            torch.testing.assert_close(result.logits, whole, atol=2e-5, rtol=1e-4)
            assert result.depths.tolist() == [n_loops] * len(sequence)


@pytest.mark.parametrize(("name", "kind"), crossed(EXITING, KINDS))
def test_batched_is_single_token_for_token(name: str, kind: Any, make_model: Make) -> None:
    model = make_model(*VARIANTS[name], "exit.kind=gate")
    ids = sequences(model)
    rule = ExitRule(kind, {"latent": 0.3, "kl": 0.02, "entropy": 3.4, "stable": 1, "gate": 0.3}[kind])
    together = score_sequences(model, ids, n_loops=6, rule=rule, batch_size=4)
    for sequence, result in zip(ids, together, strict=True):
        (alone,) = score_sequences(model, [sequence], n_loops=6, rule=rule)
        assert result.depths.tolist() == alone.depths.tolist()
        torch.testing.assert_close(result.logits, alone.logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_some_tokens_stop_early_and_none_before_the_rule_can_be_asked(kind: Any, make_model: Make) -> None:
    model = make_model("inject.kind=diagonal", "exit.kind=gate")
    rule = ExitRule(kind, {"latent": 0.3, "kl": 0.02, "entropy": 3.4, "stable": 1, "gate": 0.3}[kind])
    depths = torch.cat([s.depths for s in score_sequences(model, sequences(model), n_loops=12, rule=rule)])
    assert len(depths.unique()) > 1
    assert depths.min() >= rule.first_loop
    assert depths.min() >= 2 or kind in ("entropy", "gate")


def test_where_all_tokens_stop_at_once_it_is_that_many_loops(make_model: Make) -> None:
    model = make_model("inject.kind=add")
    ids = sequences(model)
    for sequence, result in zip(ids, score_sequences(model, ids, n_loops=9, rule=ExitRule("latent", 1e6)), strict=True):
        torch.testing.assert_close(result.logits, model(sequence[None], n_loops=2).logits[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rules_by_hand(kind: Any, make_model: Make) -> None:
    """A sequence of one token sees nothing but itself: where it stops can be read off the states of a full run."""
    model = make_model("inject.kind=diagonal", "n_prelude=0", "n_coda=0", "exit.kind=gate")
    ids = torch.tensor([[7]])
    states: list[Tensor] = []
    with torch.no_grad():
        model.hidden(ids, plan=LoopPlan(12), states=states)
        p = [model.logits(model.norm(state))[0, 0].double().softmax(-1) for state in states]
    measured = {
        "latent": [float((b - a).norm() / b.norm()) for a, b in pairwise(states)],
        "kl": [float((b * (b / a).log()).sum()) for a, b in pairwise(p)],
        "entropy": [float(-(b * b.log()).sum()) for b in p],
    }
    if kind == "gate":
        left = torch.cat([1 - model.exit.done(state) for state in states]).flatten().cumprod(0)  # type: ignore[arg-type]
        rule = ExitRule(kind, float((left[3] + left[4]).detach()) / 2)
        expected = 5
    elif kind == "stable":
        rule, best = ExitRule(kind, 3), [int(each.argmax()) for each in p]
        expected = next(loop for loop in range(4, 13) if len(set(best[loop - 4 : loop])) == 1)
    else:
        values = measured[kind]
        rule = ExitRule(kind, (min(values[:6]) + sorted(values[:6])[1]) / 2)
        first = 1 if kind == "entropy" else 2
        expected = next(loop for loop, value in enumerate(values, start=first) if value < rule.threshold)
    (result,) = score_sequences(model, [ids[0]], n_loops=12, rule=rule)
    assert result.depths.tolist() == [expected]
    torch.testing.assert_close(result.logits, model(ids, n_loops=expected).logits[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_weights_stop_and_run_to_full_depth_too(kind: Any, make_model: Make) -> None:
    model = make_model("inject.kind=diagonal", "vocab_size=600", "exit.kind=gate")
    ids = [torch.randint(600, (length,)) for length in LENGTHS]
    rule = ExitRule(kind, {"latent": 0.05, "kl": 1e-3, "entropy": 6.5, "stable": 2, "gate": 0.3}[kind])
    rounded = score_sequences(model.to(torch.bfloat16), ids, n_loops=12, rule=rule, batch_size=3)
    assert min(int(each.depths.min()) for each in rounded) < 12
    for each in score_sequences(model, ids, n_loops=5, rule=ExitRule(kind, 0), batch_size=3):
        assert set(each.depths.tolist()) == {5}


def test_progress_counts_every_sequence_once(make_model: Make) -> None:
    model = make_model()
    heard: list[int] = []
    score_sequences(model, sequences(model), n_loops=3, rule=NEVER, batch_size=2, on_progress=heard.append)
    assert sum(heard) == len(LENGTHS)
    assert score_sequences(model, [], n_loops=3, rule=NEVER) == []


@pytest.mark.parametrize("text", ["latent:0.01", "kl:0.0005", "entropy:0.05", "stable:6", "latent:1e-06"])
def test_a_rule_is_read_as_it_is_written(text: str) -> None:
    assert str(ExitRule.parse(text)) == text


def test_a_kind_alone_has_its_usual_threshold() -> None:
    assert ExitRule.parse(" kl ") == ExitRule("kl", 5e-4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("laten:0.1", "did you mean 'latent'"),
        ("latent:-1", "'-1'"),
        ("latent:", "''"),
        ("latent:nan", "'nan'"),
        ("stable:1.5", "whole number"),
    ],
)
def test_a_wrong_rule_is_one_clear_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ExitRule.parse(text)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_loops": 0}, "n_loops is 0"),
        ({"n_loops": [2, 3]}, "2 numbers for 7 sequences"),
        ({"n_loops": 2, "batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_run_is_refused(kwargs: dict[str, Any], message: str, make_model: Make) -> None:
    model = make_model()
    with pytest.raises(LooplmError, match=message):
        score_sequences(model, sequences(model), rule=NEVER, **kwargs)


def test_sequences_and_models_that_do_not_fit_are_refused(make_model: Make) -> None:
    with pytest.raises(DataError, match="sequence 0 has 65 tokens"):
        score_sequences(make_model(), [torch.zeros(65, dtype=torch.long)], n_loops=2, rule=NEVER)
    with pytest.raises(DataError, match="sequence 0 has 0 tokens"):
        score_sequences(make_model(), [torch.zeros(0, dtype=torch.long)], n_loops=2, rule=NEVER)
    with pytest.raises(ConfigError, match="an exit over several states"):
        score_sequences(make_model("exit.kind=act"), [torch.zeros(3, dtype=torch.long)], n_loops=2, rule=NEVER)
    with pytest.raises(ConfigError, match="backout"):
        score_sequences(make_model("backout=true"), [torch.zeros(3, dtype=torch.long)], n_loops=2, rule=NEVER)
