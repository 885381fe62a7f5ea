"""Looking at a run cannot end it: a look that fails costs one warning line."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_config
from copying import Copying
from looplm.checkpoint import checkpoints
from looplm.data.pack import Batch
from looplm.errors import DataError, LooplmError
from looplm.model.looped import LoopedLM
from looplm.telemetry.sinks import TensorBoardSink
from looplm.telemetry.smooth import N_STEPS, ShownLoss
from looplm.train.fit import fit
from looplm.train.options import TrainConfig
from looplm.train.run import resolve_run, resume_run, start_run

CPU = {"device": "cpu", "precision": "fp32", "compile": False, "n_threads": 1}


def broken(*given: Any, **options: Any) -> Any:
    raise ZeroDivisionError("a bug\nof two lines")


def assert_one_line(caplog: pytest.LogCaptureFixture, what: str, *, times: int = 1) -> None:
    found = [record.getMessage() for record in caplog.records if what in record.getMessage()]
    assert len(found) == times, caplog.text
    assert all("ZeroDivisionError: a bug" in line and "\n" not in line for line in found)


@pytest.mark.parametrize(
    ("place", "what"),
    [
        ("looplm.train.run.held_out_loss", "validation failed"),
        ("looplm.train.fit.probe_loops", "the probe of the loops failed"),
    ],
)
def test_a_run_outlives_its_looks(
    tmp_path: Path,
    tiny_reason: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    place: str,
    what: str,
) -> None:
    monkeypatch.setattr(place, broken)
    config = resolve_run("reason", overrides=[*tiny_reason, "train.validate_every=3", "train.probe_every=3"])
    with caplog.at_level(logging.WARNING):
        assert start_run(config, tmp_path / "run").position.step == 6
    assert_one_line(caplog, what, times=2)
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000006"


def test_a_checkpoint_is_written_before_the_first_look(
    tmp_path: Path, tiny_reason: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look may take memory that is not there: the system then ends the process without a word."""

    def killed(*given: object, **options: object) -> None:
        raise SystemExit

    monkeypatch.setattr("looplm.train.run.held_out_loss", killed)
    with pytest.raises(SystemExit):
        start_run(resolve_run("reason", overrides=[*tiny_reason, "train.validate_every=2"]), tmp_path / "run")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step-00000002"]


def test_a_byte_model_with_more_ids_than_bytes_trains_to_its_end(tmp_path: Path, tiny_reason: list[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    changes = [each for each in tiny_reason if not each.startswith("data.")]
    changes += [f"data.path={text}", "data.n_rows=2", "data.row_len=64", "model.vocab_size=300"]
    start_run(resolve_run("text", overrides=[*changes, "train.validate_every=2"]), tmp_path / "run")
    assert checkpoints(tmp_path / "run")[-1].name == "step-00000006"
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("val_bpb" in record for record in records) == 3


def test_a_sample_that_fails_leaves_the_validation(
    tmp_path: Path, tiny_reason: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("looplm.train.run._add_sample", broken)
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    changes = [each for each in tiny_reason if not each.startswith("data.")]
    changes += [f"data.path={text}", "data.n_rows=2", "data.row_len=64", "train.validate_every=6"]
    start_run(resolve_run("text", overrides=changes), tmp_path / "run")
    assert_one_line(caplog, "the sample failed")
    assert '"val_bpb"' in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_who_watches_and_copies_fail_alone(
    tmp_path: Path, tiny_reason: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(TensorBoardSink, "write", broken, raising=True)
    monkeypatch.setattr(TensorBoardSink, "__init__", lambda self, folder: None)
    monkeypatch.setattr(TensorBoardSink, "close", broken)
    seen: list[float] = []
    watchers = (broken, lambda record: seen.append(record["step"]))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run", observers=watchers)
    assert seen == [1, 2, 3, 4, 5, 6]
    assert_one_line(caplog, "what watches the run failed")
    assert_one_line(caplog, "TensorBoard gets no more records")
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6


def test_a_gate_that_cannot_be_asked_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("looplm.train.fit.next_token_score", broken)
    plan = {"kind": "curriculum", "low": 1, "high": 2, "accuracy": 0.01}
    config = TrainConfig(steps=20, plan=plan, n_workers=0, runtime=CPU)  # type: ignore[arg-type]
    assert fit(LoopedLM(tiny_config()), Copying(), config, folder=tmp_path).position.level == 0
    assert_one_line(caplog, "the gate's question failed")


@pytest.mark.parametrize("error", [DataError("a shard is gone"), RuntimeError("a bug")])
@pytest.mark.parametrize("n_workers", [0, 1])
def test_an_error_of_the_data_saves_what_was_learned(tmp_path: Path, error: Exception, n_workers: int) -> None:
    class Ending(Copying):
        def batch(self, index: int) -> Batch:
            if index == 3:
                raise error
            return super().batch(index)

    plan = {"kind": "fixed", "n_loops": 1}
    config = TrainConfig(steps=9, plan=plan, n_workers=n_workers, runtime=CPU)  # type: ignore[arg-type]
    with pytest.raises(type(error)) as raised:
        fit(LoopedLM(tiny_config()), Ending(), config, folder=tmp_path)
    assert checkpoints(tmp_path)[-1].name == "step-00000003"
    if isinstance(error, LooplmError):
        assert str(raised.value) == "a shard is gone"  # one line, from a worker too


def test_the_shown_loss_forgets_and_tells_loops_apart() -> None:
    shown = ShownLoss()
    shown.add(4.0, [(2, 4.0)])
    assert shown.numbers() == {"loss_mean": 4.0}
    shown.add(2.0, [(1, 3.0), (2, 1.0)])
    assert shown.numbers() == {"loss_mean": 3.0, "loss_mean_1": 3.0, "loss_mean_2": 2.5}
    for _ in range(10 * N_STEPS):
        shown.add(1.0, [])
    assert shown.numbers()["loss_mean"] == pytest.approx(1.0, abs=1e-3)


def test_a_resumed_run_is_looked_at_without_another_checkpoint(tmp_path: Path, tiny_reason: list[str]) -> None:
    start_run(resolve_run("reason", overrides=tiny_reason), tmp_path / "run")
    resume_run(tmp_path / "run", overrides=["train.steps=9", "train.probe_every=1", "train.keep=9"])
    assert [path.name[-1] for path in checkpoints(tmp_path / "run")] == ["6", "9"]


def test_steps_are_taken_whole_whatever_a_worker_prepares(tmp_path: Path) -> None:
    """All micro-batches of a step are taken before the first of them is learned from."""
    found = []
    for n_workers in (0, 2):
        torch.manual_seed(0)
        plan = {"kind": "fixed", "n_loops": 1}
        config = TrainConfig(steps=2, plan=plan, n_workers=n_workers, accumulate=12, runtime=CPU)  # type: ignore[arg-type]
        found.append(fit(LoopedLM(tiny_config()), Copying(), config, folder=tmp_path / str(n_workers)).final_loss)
    assert found[0] == found[1]
