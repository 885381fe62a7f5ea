"""recipes/slurm.sh with stand-ins for Slurm's commands: what it starts, and what it does when its time is up."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "slurm.sh"
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > srun.txt
trap 'echo TERM > signal.txt; kill "$nap"; sleep 0.3; echo saved > saved.txt; exit 143' TERM
{work}
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then printf 'node7\\nnode8\\n'; else echo "$@" > scontrol.txt; fi
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a job's batch script; commands leave what they were told in `tmp_path`."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, text in (("srun", SRUN.format(work="exit ${SRUN_STATUS:-0}")), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "41",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "16",
    }
    return {**os.environ, **job, "PATH": f"{commands}:{os.environ['PATH']}"}


def started(tmp_path: Path, cluster: dict[str, str], *words: str, status: int = 0) -> list[str]:
    done = subprocess.run(["bash", str(SCRIPT), *words], cwd=tmp_path, env=cluster, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (status, "")
    return (tmp_path / "srun.txt").read_text().splitlines()


TORCHRUN = [
    "torchrun",
    "--nnodes=2",
    "--nproc-per-node=4",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=node7:29500",
    "--rdzv-id=41",
    "--shutdown-timeout=110",
]


def test_a_new_run_is_started_on_all_nodes(tmp_path: Path, cluster: dict[str, str]) -> None:
    told = started(tmp_path, cluster, "pretrain-osrt-v4", "train.accumulate=8")
    assert told[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=16"]
    train = ["-m", "looplm", "train", "pretrain-osrt-v4", "train.accumulate=8", "--out", "runs/slurm"]
    assert told[2:] == TORCHRUN + train
    assert not (tmp_path / "scontrol.txt").exists()


def test_a_run_that_has_begun_goes_on(tmp_path: Path, cluster: dict[str, str]) -> None:
    (tmp_path / "my runs" / "big").mkdir(parents=True)
    (tmp_path / "my runs" / "big" / "config.yaml").touch()
    told = started(tmp_path, {**cluster, "RUN": "my runs/big", "PORT": "1234"}, "pretrain-osrt-v4")
    assert told[-5:] == ["-m", "looplm", "train", "--resume", "my runs/big"]
    assert "--rdzv-endpoint=node7:1234" in told


def test_a_failed_training_is_a_failed_job(tmp_path: Path, cluster: dict[str, str]) -> None:
    started(tmp_path, {**cluster, "SRUN_STATUS": "3"}, "pretrain", status=3)
    assert not (tmp_path / "scontrol.txt").exists()


def test_when_time_is_up_it_saves_and_queues_again(tmp_path: Path, cluster: dict[str, str]) -> None:
    (tmp_path / "bin" / "srun").write_text(SRUN.format(work="sleep 60 & nap=$!\ntouch ready.txt\nwait"))
    job = subprocess.Popen(["bash", str(SCRIPT), "pretrain"], cwd=tmp_path, env=cluster)
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready.txt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "signal.txt").read_text() == "TERM\n"
    assert (tmp_path / "saved.txt").exists()  # it waited for that
    assert (tmp_path / "scontrol.txt").read_text() == "requeue 41\n"
