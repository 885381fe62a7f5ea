"""What each stage of recipes/modal_app.py runs, without Modal: python recipes/modal_stages.py STAGE prints it.

The folders are those of the volume, where every command runs: prepared/ and runs/.
"""

import sys
from dataclasses import dataclass

STAGES = ("tokenizer", "pretrain", "sft", "grpo", "eval")
NOT_YET = {"sft": "supervised fine-tuning", "grpo": "reinforcement learning"}
PROJECT = "/looplm"  # where the image has this repository
RUN = "runs/pretrain-osrt-v4"
Command = list[str]


@dataclass(frozen=True)
class Stage:
    """What one stage runs: first without a GPU, then with."""

    on_cpu: list[Command]
    on_gpu: list[Command]
    resumed: list[Command]
    """In place of `on_gpu` where RUN has begun."""


def stage(name: str, *, n_gpus: int = 1) -> Stage:
    """The command lines of a stage, training on `n_gpus` GPUs of one machine.

    Raises:
        SystemExit: there is no such stage, or looplm cannot do it yet.
    """
    if name in NOT_YET:
        raise SystemExit(
            f"error: stage {name} ({NOT_YET[name]}) does not exist in looplm yet, nothing was started; "
            f"there is {', '.join(each for each in STAGES if each not in NOT_YET)}"
        )
    if name not in STAGES:
        raise SystemExit(f"error: no stage {name!r}; stages: {', '.join(STAGES)}")
    data = ["bash", f"{PROJECT}/recipes/osrt-v4-data.sh"]  # looplm tokenizer train, looplm data prepare
    if name == "tokenizer":
        return Stage([[*data, "tokenizer"]], [], [])
    if name == "eval":
        scores = [["looplm", "eval", RUN, "--suite", "loops", "--json", f"{RUN}/loops.json"]]
        return Stage([], scores, scores)
    train = [
        "torchrun",
        "--standalone",
        f"--nproc-per-node={n_gpus}",
        "--shutdown-timeout=900",
        "-m",
        "looplm",
        "train",
    ]
    recipe = ["pretrain-osrt-v4", f"train.accumulate={-(-8 // n_gpus) * n_gpus}", "--out", RUN]
    return Stage([[*data, "tokenizer"], [*data, "data"]], [[*train, *recipe]], [[*train, "--resume", RUN]])


if __name__ == "__main__":
    chosen = stage(sys.argv[1] if len(sys.argv) > 1 else "")
    for label, commands in vars(chosen).items():
        for command in commands:
            print(f"{label}:", *command)
