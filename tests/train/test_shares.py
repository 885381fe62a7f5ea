"""A step weighs every scored token alike, whichever micro-batch or rank it is in; without any it moves nothing."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_config
from looplm.checkpoint import latest_checkpoint, load, read_tensors
from looplm.data.pack import IGNORE, Batch
from looplm.data.sources import PermutationsSource
from looplm.errors import DataError
from looplm.eval.loops import bits_per_byte, follow_states, held_out_loss
from looplm.model.looped import LoopedLM
from looplm.train.fit import FitResult, fit
from looplm.train.options import TrainConfig

CPU = {"device": "cpu", "precision": "fp32", "compile": False, "n_threads": 1}
FIXED = {"kind": "fixed", "n_loops": 2}


def uneven_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of 16, of which 1 and 16 tokens are scored."""
    torch.manual_seed(0)
    ids = torch.randint(3, 500, (2, 16))
    targets = ids.roll(-1, 1).clone()
    targets[0, :15] = IGNORE
    return ids, targets


@dataclass
class Rows:
    """A source that gives the rows `n_rows` at a time."""

    ids: torch.Tensor
    targets: torch.Tensor
    n_rows: int
    fingerprint: str = ""

    def batch(self, index: int) -> Batch:
        n_batches = len(self.ids) // self.n_rows
        rows = slice(index % n_batches * self.n_rows, (index % n_batches + 1) * self.n_rows)
        return Batch(self.ids[rows], self.targets[rows])


def trained(model: LoopedLM, source: Any, folder: Path, *, steps: int = 1, **options: Any) -> FitResult:
    options = {"plan": FIXED, "n_workers": 0, "log_every": 1, "grad_clip": None, **options}
    return fit(model, source, TrainConfig(steps=steps, runtime=CPU, **options), folder=folder)  # type: ignore[arg-type]


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_steps(one: Path, two: Path) -> None:
    """The same loss and gradient of every step, and the same weights in the end."""
    for name in ("loss", "grad_norm"):
        losses = [[record[name] for record in records(folder)] for folder in (one, two)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    ours, theirs = (read_tensors(latest_checkpoint(folder) / "model.safetensors") for folder in (one, two))
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def test_two_micro_batches_train_as_one_batch_of_all_their_rows(tmp_path: Path) -> None:
    ids, targets = uneven_rows()
    for name, n_rows in (("one", 2), ("two", 1)):
        result = trained(load("builtin:reasoner"), Rows(ids, targets, n_rows), tmp_path / name, accumulate=2 // n_rows)
        assert result.final_loss == pytest.approx(24.2412, abs=1e-3)
    assert_same_steps(tmp_path / "one", tmp_path / "two")


OPTIONS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "label smoothing": ([], {"label_smoothing": 0.1}),
    "loop loss": (["inject.kind=diagonal"], {"loop_loss": {"share": 0.3}}),
    "state loss": ([], {"state_loss": {"norm": 0.5}}),
    "gate": (["exit.kind=gate"], {"exit_gate": {"alone": 0.5}}),
    "ponder cost": (["exit={kind: act, ponder_cost: 0.1}"], {}),
    "averaged": ([], {"ema": 0.9}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_loss_weighs_scored_tokens_alike(tmp_path: Path, name: str) -> None:
    changes, options = OPTIONS[name]
    ids = torch.randint(3, 40, (4, 12), generator=torch.Generator().manual_seed(1))
    targets = ids.roll(-1, 1).clone()
    for row, n_unscored in enumerate((11, 3, 12, 0)):  # one row has nothing scored
        targets[row, :n_unscored] = IGNORE
    for folder, n_rows in (("one", 4), ("four", 1)):
        torch.manual_seed(0)
        model = LoopedLM(tiny_config(*changes))
        source = Rows(ids, targets, n_rows)
        trained(model, source, tmp_path / folder, steps=2, accumulate=4 // n_rows, **options)
    assert_same_steps(tmp_path / "one", tmp_path / "four")


def test_loops_by_row_weigh_scored_tokens_alike(tmp_path: Path) -> None:
    """A plan draws loops for each micro-batch, so the halves are compared with the same rows scored one by one."""
    ids, targets = uneven_rows()
    plan = {"kind": "poisson", "mean": 2}
    torch.manual_seed(0)
    start = {name: tensor.clone() for name, tensor in LoopedLM(tiny_config("vocab_size=500")).state_dict().items()}
    losses = {}
    for name, kept in (("first", [0]), ("second", [1]), ("both", [0, 1])):
        model = LoopedLM(tiny_config("vocab_size=500"))
        model.load_state_dict(start)
        scored = targets.clone()
        for row in {0, 1} - set(kept):
            scored[row] = IGNORE
        losses[name] = trained(model, Rows(ids, scored, 1), tmp_path / name, accumulate=2, plan=plan).final_loss
    assert losses["both"] == pytest.approx((losses["first"] + 16 * losses["second"]) / 17, rel=1e-5)


@pytest.mark.parametrize("n_workers", [0, 1])
def test_a_step_without_scored_tokens_moves_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, n_workers: int
) -> None:
    ids, targets = uneven_rows()
    scored = torch.cat([targets[1:], torch.full_like(targets[:1], IGNORE), targets[1:]])
    rows = Rows(torch.cat([ids[1:], ids]), scored, 1)
    model = LoopedLM(tiny_config("vocab_size=500"))
    seen: list[dict[str, torch.Tensor]] = []

    def keep(record: dict[str, float]) -> None:
        seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    config = TrainConfig(steps=3, plan=FIXED, n_workers=n_workers, log_every=1, probe_every=1, ema=0.5, runtime=CPU)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        result = fit(model, rows, config, folder=tmp_path, observers=(keep,))
    assert caplog.text.count("no token is scored") == 1
    assert "failed" not in caplog.text
    assert result.position.step == 3
    assert result.final_loss == result.final_loss
    assert ["loss" in record for record in records(tmp_path)] == [True, False, True]
    assert all(torch.equal(seen[1][name], tensor) for name, tensor in seen[0].items())
    assert not all(torch.equal(seen[2][name], tensor) for name, tensor in seen[0].items())


def test_a_run_in_which_nothing_is_scored_is_told_so(tmp_path: Path) -> None:
    ids, targets = uneven_rows()
    source = Rows(ids, torch.full_like(targets, IGNORE), 2)
    with pytest.raises(DataError, match="no token of 3 steps was scored"):
        trained(LoopedLM(tiny_config("vocab_size=500")), source, tmp_path, steps=3)


def test_a_gate_without_scored_tokens_does_not_go_on(tmp_path: Path) -> None:
    from looplm.data.sources import PermutationsConfig

    class Unscored(PermutationsSource):
        def trial(self, index: int) -> Batch:
            batch = super().trial(index)
            return Batch(batch.ids, torch.full_like(batch.targets, IGNORE))

    source = Unscored(PermutationsConfig(batch_size=2, max_len=4, gate=0.01), seed=0)
    model = LoopedLM(tiny_config("vocab_size=10"))
    assert trained(model, source, tmp_path, steps=21).position.level == 0


def test_held_out_means_are_over_tokens() -> None:
    """Batches of unlike sizes, one of them without a scored token, are as one batch of all their rows."""
    ids, targets = uneven_rows()
    whole = Batch(ids, targets)
    nothing = Batch(ids, torch.full_like(targets, IGNORE))
    parts = [Batch(ids[:1], targets[:1]), nothing, Batch(ids[1:], targets[1:])]
    model = load("builtin:reasoner")
    assert held_out_loss(model, parts, n_loops=2) == pytest.approx(held_out_loss(model, [whole], n_loops=2), rel=1e-5)
    sizes = torch.ones(512, dtype=torch.long).numpy()
    assert bits_per_byte(model, parts, sizes, n_loops=2) == pytest.approx(
        bits_per_byte(model, [whole], sizes, n_loops=2), rel=1e-5
    )
    for one, two in zip(follow_states(model, parts, n_loops=3), follow_states(model, [whole], n_loops=3), strict=True):
        assert (one.norm, one.change or 0) == pytest.approx((two.norm, two.change or 0), rel=1e-4)
    for measure in (held_out_loss, follow_states):
        with pytest.raises(DataError, match="no token of the held-out data is scored"):
            measure(model, [nothing], n_loops=2)  # type: ignore[operator]
    with pytest.raises(DataError, match="no token"):
        bits_per_byte(model, [nothing], sizes, n_loops=2)
