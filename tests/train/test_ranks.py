"""Several processes train as one: the same losses, the same checkpoint whatever their number, and one clear error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from looplm.checkpoint import load_run
from looplm.config import to_yaml
from looplm.train.run import resolve_run, resume_run, start_run

EXPERTS = "model.core_ffn={kind: moe, d_ff: 16, n_experts: 4, top_k: 2, has_bias: true, bias_rate: 0.01}"
PLAN = "train.plan={kind: uniform, low: 1, high: 3}"
RUNTIME = "train.runtime={device: cpu, precision: fp32, compile: false, n_threads: 1}"
ADAPTER = "model.adapter={rank: 2, n_loops: 3}"  # of which a shallow plan uses a part


def torchrun(*words: str, n_ranks: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n_ranks), "-m", "looplm", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("parts", [[], [EXPERTS], [ADAPTER]], ids=["plain", "experts", "adapter"])
def test_two_ranks_follow_the_curve_of_one(tmp_path: Path, tiny_reason: list[str], parts: list[str]) -> None:
    config = resolve_run("reason", overrides=[*tiny_reason, "train.accumulate=4", PLAN, *parts])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    start_run(config, tmp_path / "one")
    done = torchrun("train", str(recipe), "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done: step 6") == 1
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (load_run(tmp_path / name).model.state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
    counts = [json.loads(line)["tokens"] for line in (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()]
    assert counts == [
        json.loads(line)["tokens"] for line in (tmp_path / "one" / "metrics.jsonl").read_text().splitlines()
    ]


def test_a_checkpoint_of_two_ranks_goes_on_with_one(tmp_path: Path, tiny_reason: list[str]) -> None:
    overrides = [*tiny_reason, "train.accumulate=2"]
    start_run(resolve_run("reason", overrides=overrides), tmp_path / "one")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(resolve_run("reason", overrides=[*overrides, "train.steps=3"])))
    done = torchrun("train", str(recipe), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    first = losses(tmp_path / "run")
    resume_run(tmp_path / "run", overrides=["train.steps=6"])
    assert losses(tmp_path / "run")[:3] == first
    whole = losses(tmp_path / "one")
    assert losses(tmp_path / "run")[0] == pytest.approx(whole[0], abs=1e-5)  # later ones have another schedule
    done = torchrun("train", "--resume", str(tmp_path / "run"), "--steps", "8")
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "run")) == 8


def test_ranks_that_cannot_share_a_step_are_told_so(tmp_path: Path, tiny_reason: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(resolve_run("reason", overrides=tiny_reason)))
    done = torchrun("train", str(recipe), "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert done.stderr.count("error: a step of 1 micro-batches cannot be shared by 2 ranks") == 1
    assert "give train.accumulate=2" in done.stderr
    assert "looplm/cli/main.py" not in done.stderr  # torchrun's own traceback alone
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_budget_in_flops_ends_ranks_with_rows_of_unlike_lengths_together(tmp_path: Path) -> None:
    changes = [
        "train.minutes=null",
        "train.flops=8.0e8",
        "train.accumulate=2",
        "train.n_workers=0",
        "train.log_every=1",
    ]
    config = resolve_run("s3", overrides=[*changes, "data={batch_size: 2, n_ramp: 0}", RUNTIME])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    start_run(config, tmp_path / "one")
    done = torchrun("train", str(recipe), "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "one")) > 3
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
