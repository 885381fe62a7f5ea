"""Probes: what they say is true, and training does not notice them."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from looplm.checkpoint import latest_checkpoint, read_tensors
from looplm.data.pack import Batch
from looplm.model.block import ResidualAdapter
from looplm.model.loop.inject import DiagonalInject
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM
from looplm.train.losses import next_token_loss
from looplm.train.probes import probe_loops, worries
from looplm.train.run import resolve_run, start_run

IDS = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(7))
BATCH = Batch(IDS, IDS.roll(-1, dims=1))


def test_losses_and_decays_are_the_models(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model("inject.kind=diagonal")
    found = probe_loops(model, BATCH, n_loops=2)
    for count in (1, 2, 4, 8):
        loss = float(next_token_loss(model, BATCH, LoopPlan(count)).detach())
        assert found[f"probe/loss_{count}"] == pytest.approx(loss, rel=1e-5)
    assert "probe/state_change_8" in found
    assert isinstance(model.inject, DiagonalInject)
    assert found["probe/decay_median"] == pytest.approx(float(model.inject.decay().median()))
    assert not any("adapter" in name or "max_load" in name for name in found)


def test_adapters_that_are_one_are_told_from_those_that_differ(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model("adapter={rank: 2, n_loops: 4}")
    found = probe_loops(model, BATCH, n_loops=2)
    chance = found["probe/adapter_similarity_by_chance"]
    assert 0 < chance < 0.3
    assert abs(found["probe/adapter_similarity"] - chance) < 0.1
    for module in model.modules():
        if isinstance(module, ResidualAdapter):
            with torch.no_grad():
                module.a.copy_(module.a[:1].expand_as(module.a))
                module.b.copy_(module.b[:1].expand_as(module.b))
    assert probe_loops(model, BATCH, n_loops=2)["probe/adapter_similarity"] == pytest.approx(1, abs=1e-4)


def test_router_load_is_by_loop(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model("core_ffn={kind: moe, n_experts: 4, d_ff: 8, top_k: 1}")
    found = probe_loops(model, BATCH, n_loops=3)
    loads = [found[f"probe/max_load_{loop}"] for loop in (1, 2, 3)]
    assert all(1 <= load <= 4 for load in loads)
    assert "probe/max_load_4" not in found
    for block in model.core:
        torch.nn.init.zeros_(block.moe.router.weight)  # type: ignore[union-attr]  # a tie: all to the first expert
    assert probe_loops(model, BATCH, n_loops=3)["probe/max_load_2"] == pytest.approx(4)


def test_loops_that_do_nothing_and_states_that_grow_are_worrying(make_model: Callable[..., LoopedLM]) -> None:
    fine = {"probe/loss_1": 2.0, "probe/loss_4": 1.0, "probe/state_change_2": 0.5, "probe/is_drifting": 0.0}
    assert list(worries(fine, n_loops=4)) == []
    same = fine | {"probe/loss_4": 1.999}
    assert [kind for kind, _ in worries(same, n_loops=4)] == ["collapse"]
    assert [kind for kind, _ in worries(fine | {"probe/state_change_2": 0.001}, n_loops=4)] == ["collapse"]
    assert list(worries(same, n_loops=1)) == []  # nothing to collapse
    growing = probe_loops(make_model("inject.kind=add"), BATCH, n_loops=2)
    assert growing["probe/growth_beyond"] > 1.5
    assert "drift" in [kind for kind, _ in worries(growing, n_loops=2)]


def test_a_probed_run_is_the_run(tmp_path: Path, tiny_reason: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        start_run(resolve_run("reason", overrides=[*tiny_reason, "train.log_every=5"]), tmp_path / "plain")
        assert not caplog.records
        probed = [*tiny_reason, "train.log_every=5", "train.probe_every=2"]
        start_run(resolve_run("reason", overrides=probed), tmp_path / "probed")
    one, two = (read_tensors(latest_checkpoint(tmp_path / name) / "model.safetensors") for name in ("plain", "probed"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    records = [json.loads(line) for line in (tmp_path / "probed" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "probe/loss_1" in record] == [2, 4, 6]
    assert [record["step"] for record in records] == [2, 4, 5, 6]
    # six steps have taught the loops nothing yet; it is said once, not at every probe
    assert len([record for record in caplog.records if "collapsed" in record.message]) == 1
