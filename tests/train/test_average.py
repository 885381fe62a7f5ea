"""Averaged weights: by their definition, through a resume, and over checkpoints."""

import os
import signal
from pathlib import Path

import pytest
import torch

from looplm.checkpoint import AVERAGE, MODEL, checkpoints, load_run, read_tensors
from looplm.errors import ConfigError
from looplm.model.looped import LoopedLM
from looplm.telemetry.sinks import Record
from looplm.train.average import average_checkpoints
from looplm.train.run import resolve_run, resume_run, start_run

EVERY_STEP = ["train.ema=0.4", "train.checkpoint_steps=1", "train.keep=9"]


def test_the_average_is_that_of_the_weights_after_every_step(tmp_path: Path, tiny_reason: list[str]) -> None:
    config = resolve_run("reason", overrides=[*tiny_reason, *EVERY_STEP])
    start_run(config, tmp_path / "run")
    torch.manual_seed(config.train.seed)
    average = {name: tensor.clone() for name, tensor in LoopedLM(config.model).state_dict().items()}
    found = checkpoints(tmp_path / "run")
    assert len(found) == 6
    for step, path in enumerate(found, start=1):
        decay = min(0.4, (1 + step) / (10 + step))
        for name, tensor in read_tensors(path / MODEL).items():
            average[name] = decay * average[name] + (1 - decay) * tensor
        for name, tensor in read_tensors(path / AVERAGE).items():
            torch.testing.assert_close(tensor, average[name], msg=f"{step} {name}")
    loaded = load_run(tmp_path / "run").model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in read_tensors(found[-1] / AVERAGE).items())


def test_an_average_is_resumed_exactly(tmp_path: Path, tiny_reason: list[str]) -> None:
    def interrupt(record: Record) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)

    config = resolve_run("reason", overrides=[*tiny_reason, "train.ema=0.9"])
    start_run(config, tmp_path / "whole")
    start_run(config, tmp_path / "parts", observers=(interrupt,))
    resume_run(tmp_path / "parts")
    one, other = (read_tensors(checkpoints(tmp_path / name)[-1] / AVERAGE) for name in ("whole", "parts"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())


def test_checkpoints_are_averaged_into_a_run_of_their_own(tmp_path: Path, tiny_reason: list[str]) -> None:
    overrides = [*tiny_reason, "train.checkpoint_steps=2", "train.keep=3"]
    start_run(resolve_run("reason", overrides=overrides), tmp_path / "run")
    taken = average_checkpoints(tmp_path / "run", tmp_path / "mean", n=2)
    assert [path.name for path in taken] == ["step-00000004", "step-00000006"]
    one, two = (read_tensors(path / MODEL) for path in taken)
    for name, tensor in load_run(tmp_path / "mean").model.state_dict().items():
        if name in one:
            torch.testing.assert_close(tensor, (one[name] + two[name]) / 2)
    with pytest.raises(ConfigError, match="has 3 checkpoints, and an average takes 2 or more, not 4"):
        average_checkpoints(tmp_path / "run", tmp_path / "other", n=4)
    with pytest.raises(ConfigError, match="exists; give a new folder"):
        average_checkpoints(tmp_path / "run", tmp_path / "mean", n=2)
