"""Nano-OSRT's stages on Modal's GPUs, rented by the second (written for modal 1.6.4):

    pip install modal==1.6.4 && modal setup
    modal run --detach recipes/modal_app.py --stage pretrain --gpu H100:8

Stages: tokenizer, pretrain, eval; `python recipes/modal_stages.py STAGE` prints what they run. Data and runs are in a
volume: `modal volume get looplm runs/pretrain-osrt-v4` brings the run here. Text is prepared without a GPU, and the
machine that started it has to stay connected until training begins. A function lives for a day at most: half an hour
before, a checkpoint is written, and it is started again.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from modal_stages import PROJECT, RUN, Command
from modal_stages import stage as find_stage

try:
    import modal
except ModuleNotFoundError:
    raise SystemExit("error: recipes/modal_app.py needs modal: pip install modal==1.6.4, then modal setup") from None

VOLUME = "/volume"
DAY, RESERVE = 86_400, 1_800  # seconds
STARTS = 10  # again, the most that Modal allows

if modal.is_local():  # before `modal run` builds the image, which comes before `main`
    asked = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    asked.add_argument("--stage")
    if (name := asked.parse_known_args()[0].stage) is not None:
        find_stage(name)

image = (
    modal.Image.debian_slim(python_version="3.11")
    .apt_install("g++")  # for torch.compile
    .add_local_dir(
        Path(__file__).parents[1],
        PROJECT,
        copy=True,
        ignore=[".git", ".venv", "**/__pycache__", "runs", "demo", "compare", "prepared"],
    )
    .run_commands(f"pip install -c {PROJECT}/constraints.txt '{PROJECT}[data]'")
    .env({"PYTHONPATH": f"{PROJECT}/recipes"})
)
volume = modal.Volume.from_name("looplm", create_if_missing=True)
retries = modal.Retries(max_retries=STARTS, initial_delay=0.0)
app = modal.App("looplm", image=image, volumes={VOLUME: volume})


@app.function(cpu=16, memory=65_536, timeout=DAY, retries=retries, single_use_containers=True)
def on_cpu(commands: list[Command]) -> int:
    """Run them one after another; the exit status of the first that failed."""
    return run(commands)


@app.function(gpu="H100", timeout=DAY, retries=retries, single_use_containers=True)
def on_gpu(commands: list[Command], resumed: list[Command]) -> int:
    """As `on_cpu`, or the command that continues the run if it has begun."""
    return run(resumed if Path(VOLUME, RUN, "config.yaml").exists() else commands)


def run(commands: list[Command]) -> int:
    """In the volume. A failure is returned: raised, it would be tried and paid for again."""
    deadline = time.monotonic() + DAY - RESERVE
    for command in commands:
        process = subprocess.Popen(command, cwd=VOLUME)
        try:
            status = process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()  # torchrun hands it to the ranks, which write a checkpoint
            process.wait()
            volume.commit()
            raise TimeoutError("the day is over; start it again to continue") from None
        volume.commit()
        if status:
            return status
    return 0


@app.local_entrypoint()
def main(stage: str, gpu: str = "H100") -> None:
    """Run a stage: tokenizer, pretrain, sft, grpo or eval, on a GPU such as H100, or several of one machine, H100:8."""
    count = gpu.partition(":")[2] or "1"
    if not count.isdecimal() or count == "0":
        raise SystemExit(f"error: --gpu {gpu!r} is no kind of GPU with a number, such as H100:8")
    chosen = find_stage(stage, n_gpus=int(count))
    status = on_cpu.remote(chosen.on_cpu) if chosen.on_cpu else 0
    if not status and chosen.on_gpu:
        status = on_gpu.with_options(gpu=gpu).remote(chosen.on_gpu, chosen.resumed)
    if status:
        sys.exit(f"error: stage {stage} ended with status {status}; its last lines say why")
