"""Several processes train as one: the same losses, the same checkpoint whatever their number, and one clear error."""

import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import long
from looplm.checkpoint import latest_checkpoint, load_run
from looplm.config import to_yaml
from looplm.errors import CheckpointError
from looplm.telemetry.history import read_history, series
from looplm.train.average import average_checkpoints
from looplm.train.run import resolve_run, resume_run, start_run
from ranks import ranks

EXPERTS = "model.core_ffn={kind: moe, d_ff: 16, n_experts: 4, top_k: 2, has_bias: true, bias_rate: 0.01}"
PLAN = "train.plan={kind: uniform, low: 1, high: 3}"
RUNTIME = "train.runtime={device: cpu, precision: fp32, compile: false, n_threads: 1}"
ADAPTER = "model.adapter={rank: 2, n_loops: 3}"  # of which a shallow plan uses a part


def torchrun(
    *words: str, program: tuple[str, ...] = ("-m", "looplm"), before: Callable[[], None] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *program, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, preexec_fn=before)


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("parts", [[ADAPTER], *long(([],), ([EXPERTS],))])
def test_two_ranks_follow_the_curve_of_one(tmp_path: Path, tiny_reason: list[str], parts: list[str]) -> None:
    config = resolve_run("reason", overrides=[*tiny_reason, "train.accumulate=4", PLAN, *parts])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    start_run(config, tmp_path / "one")
    done = ranks("train", str(recipe), "--out", str(tmp_path / "two"))
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
    done = ranks("train", "--resume", str(tmp_path / "run"), "--steps", "8")
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
    done = ranks("train", str(recipe), "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "one")) > 3
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


SHARED = ["train.accumulate=4", PLAN, "train.shard=true", "model.n_prelude=1", "model.n_coda=1", "train.ema=0.5"]
WATCHED = ["train.validate_every=3", "train.probe_every=3", "train.log_every=2", "train.checkpoint_steps=3"]
MATRICES = ["train.optimizer={matrices: normuon, others: lion, weight_decay: 0.1}", "model.inject={kind: diagonal}"]


LOSSES = ["train.loop_loss={share: 0.2}", "train.state_loss={norm: 0.01}"]
GATE = ["model.exit={kind: gate}", "train.exit_gate={alone: 0.5}"]
SCALARS = ["model.core_ffn={kind: parallel, d_ff: 32, moe: {kind: moe, d_ff: 16, n_experts: 2, top_k: 2}}"]
THIN = ["model.adapter={rank: 1, n_loops: 3}"]  # whose matrices are as large as what NorMuon remembers of them


@pytest.mark.parametrize(
    "parts",
    [[ADAPTER, *MATRICES, *LOSSES], *long(([],), ([EXPERTS],), ([*GATE, *SCALARS, *THIN, MATRICES[0]],))],
)
def test_ranks_that_share_the_weights_out_follow_the_curve_of_one(
    tmp_path: Path, tiny_reason: list[str], parts: list[str]
) -> None:
    config = resolve_run("reason", overrides=[*tiny_reason, *SHARED, *WATCHED, *parts])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    start_run(config, tmp_path / "one")
    done = ranks("train", str(recipe), "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    one, two = (load_run(tmp_path / name).model.state_dict() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=2e-4, rtol=1e-3, msg=name)
    records = [read_history(tmp_path / name) for name in ("one", "two")]
    a, b = (series(record, "val_loss")[1] for record in records)
    assert len(a) == 2
    assert b == pytest.approx(a, rel=1e-3)
    assert len(series(records[1], "probe/state_rms_2")[1]) == 2
    newest = latest_checkpoint(tmp_path / "two")
    assert sorted(path.name for path in (newest / "training.shards").iterdir()) == [
        f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2)
    ]
    # on with one process, and the run of one process on with two that share it out
    resume_run(tmp_path / "two", overrides=["train.steps=9"])
    done = ranks("train", "--resume", str(tmp_path / "one"), "--steps", "9")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    assert (latest_checkpoint(tmp_path / "two") / "model.safetensors").is_file()
    assert (latest_checkpoint(tmp_path / "one") / "average.shards").is_dir()
    assert average_checkpoints(tmp_path / "one", tmp_path / "mean", n=2)  # of one whole and one shared out


def test_a_shard_that_is_gone_or_cut_short_is_one_clear_error(tmp_path: Path, tiny_reason: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(resolve_run("reason", overrides=[*tiny_reason, *SHARED, "train.steps=1"])))
    done = ranks("train", str(recipe), "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    first, second = sorted((latest_checkpoint(tmp_path / "run") / "average.shards").iterdir())
    kept = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=r"lacks a part of|does not fit the model"):
        load_run(tmp_path / "run")
    second.write_bytes(kept[:-100])
    with pytest.raises(CheckpointError, match="cut short or not safetensors"):
        load_run(tmp_path / "run")
    second.write_bytes(kept)
    load_run(tmp_path / "run")
    first.unlink()
    with pytest.raises(CheckpointError, match="lacks a part of"):
        load_run(tmp_path / "run")
    sorted((first.parents[1] / "training.shards").iterdir())[1].unlink()
    with pytest.raises(CheckpointError, match=r"training\.\w+ (holds no|lacks a part|does not fit)"):
        resume_run(tmp_path / "run", overrides=["train.steps=2"])


def test_a_full_disk_ends_all_ranks_in_one_clear_error(tmp_path: Path, tiny_reason: list[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(resolve_run("reason", overrides=[*tiny_reason, *SHARED, "train.steps=1"])))

    def small_files() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = torchrun("train", str(recipe), "--out", str(tmp_path / "run"), before=small_files)
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search("could not be written .*File too large.*no earlier one", line)
    assert "RANK 1" not in done.stderr


COUNTS = """
import torch
from torch import nn
from looplm import dist
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM
from looplm.train.run import resolve_run

config = resolve_run("reason", overrides=["model.n_prelude=1", "model.n_coda=1", "model.d_model=96"]).model

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = LoopedLM(config)
    def forward(self, n_loops):
        return self.model(torch.arange(8)[None], plan=LoopPlan(n_loops)).logits.sum()

asked = []
for name in ("all_gather_single", "reduce_scatter_single"):
    def counting(*words, name=name, usual=getattr(torch.distributed, name), **options):
        asked.append(name)
        return usual(*words, **options)
    setattr(torch.distributed, name, counting)

with dist.process_group(device="cpu"):
    whole = Whole()
    layers = [*whole.model.prelude, *whole.model.coda]
    sharded = dist.shard(whole, layers=layers, device="cpu")
    said = []
    for n_loops in (2, 6):
        asked.clear()
        whole(n_loops).backward()
        said.append(sorted(asked))
    kept = sum(dist.local(p).numel() for p in whole.parameters()) / sum(p.numel() for p in whole.parameters())
    if dist.is_main():
        print(said[0] == said[1], *(said[0].count(name) for name in sorted(set(said[0]))), round(kept, 2))
"""


def test_the_core_is_gathered_once_however_many_loops_there_are(tmp_path: Path) -> None:
    script = tmp_path / "counts.py"
    script.write_text(COUNTS)
    done = torchrun(program=(str(script),))
    assert done.returncode == 0, done.stderr
    alike, n_gathered, n_summed, kept = done.stdout.split()
    assert alike == "True"
    assert (n_gathered, n_summed) == ("5", "3")  # prelude and coda for forward and backward, all else once for both
    assert float(kept) == pytest.approx(0.5, abs=0.02)
