"""Bits per byte after equal wall time: a plain and a looped model of ours against nanochat, trained beside each other.

python benchmarks/bpb.py TEXT --nanochat PATH --json out.json [--seconds 300] [--threads 2] [--only NAME ...]

TEXT is read as bytes by all (our byte tokenizer, 256 ids): the first nine tenths to learn from, the last tenth held
out, each of its bytes scored once, in windows of 256. PATH is a checkout of karpathy/nanochat; its model and optimizer
are trained as its scripts/base_train.py trains them, with heads of 64 and full windows as in its runs/runcpu.sh, at
depth 4, bf16, compiled, 8 rows of 256 tokens a step (of 512, it did worse), at 1, 8 and 16 times the rates that it
works out for that batch. Ours: the same rows in the same order, bf16, compiled, as many parameters to 1 %, at the
rates below. A run is SECONDS of training steps; compiling comes before them and is not counted, and all schedules
follow the clock, so that all end with their rates decayed.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from looplm.config import parse
from looplm.data.bytes import VOCAB_SIZE, BytesConfig, BytesSource
from looplm.data.pack import IGNORE, Batch
from looplm.model.init import init_weights
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.optim.groups import GroupConfig, OptimizerConfig, make_optimizers, set_lr_scale
from looplm.optim.schedule import ScheduleConfig
from looplm.train.losses import next_token_loss

N_ROWS, ROW_LEN = 8, 256
RATES = (1, 8, 16)
SEED, N_WARM = 0, 3

ATTENTION = {"kind": "gqa", "n_heads": 4, "n_kv_heads": 4, "head_dim": 64, "qk_norm": "before_rope"}
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "d_model": 256,
    "seq_len": ROW_LEN,
    "block": {"attention": ATTENTION, "ffn": {"kind": "swiglu", "d_ff": 1072}},
    "smear": {"kind": "channel", "n_back": 8},
    "embed_norm": True,
    "tied_head": False,
    "softcap": 15.0,
}
PLAIN = COMMON | {"n_core": 3, "n_loops": 1}
LOOPED = COMMON | {"n_prelude": 1, "n_core": 1, "n_coda": 1, "n_loops": 2}
OPTIMIZER = OptimizerConfig(
    matrices="normuon",
    muon_lr=0.02,
    muon_momentum=0.9,
    adamw_lr=4e-3,
    weight_decay=0.6,
    groups={"embed.weight": GroupConfig(lr=10.0)},
)
SCHEDULE = ScheduleConfig(warmup=0.01, decay=0.9)


@dataclass
class Trainee:
    """A model as the race sees it."""

    step: Callable[[Batch, int, float], float]  # batch, number, share of the time that is over -> loss
    losses: Callable[[Batch], Tensor]  # nats of every byte (N,), by the weights that count
    reset: Callable[[], None]  # to where training starts, what is compiled stays
    n_parameters: int


def nanochat(path: Path, *, rate: float) -> Trainee:
    """Its model, optimizer and schedules, at `rate` times its own rates."""
    os.environ["NANOCHAT_DTYPE"] = "bfloat16"  # read where it is imported
    sys.path.insert(0, str(path))
    from nanochat.gpt import GPT, GPTConfig

    def build(depth: int) -> Any:
        width = 64 * depth
        shape = {"n_layer": depth, "n_head": width // 64, "n_kv_head": width // 64, "n_embd": width}
        with torch.device("meta"):
            return GPT(GPTConfig(sequence_len=ROW_LEN, vocab_size=VOCAB_SIZE, window_pattern="L", **shape))

    def scaling(model: Any) -> int:
        sizes = model.num_scaling_params()
        return sizes["transformer_matrices"] + sizes["lm_head"]

    torch.manual_seed(SEED)
    model = build(4)
    model.to_empty(device="cpu")
    model.init_weights()
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = torch.compile(model, dynamic=False)
    of_batch = (N_ROWS * ROW_LEN / 2**19) ** 0.5
    scale = of_batch * rate
    decay = 0.28 * of_batch * scaling(build(12)) / scaling(model)
    made: list[torch.optim.Optimizer] = []

    def reset() -> None:
        model.load_state_dict(start)
        rates = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02}
        made[:] = [model.setup_optimizer(**{name: scale * value for name, value in rates.items()}, weight_decay=decay)]

    def step(batch: Batch, number: int, over: float) -> float:
        loss = compiled(batch.ids, batch.targets.contiguous())
        loss.backward()
        multiplier = min((number + 1) / 40, 1.0)
        left = (1 - over) / 0.65
        if number >= 40 and left < 1:
            multiplier = left + (1 - left) * 0.05
        momentum = 0.85 + 0.12 * number / 400 if number < 400 else 0.97 - 0.07 * max(0.0, 1 - left)
        for group in made[0].param_groups:
            group["lr"] = group["initial_lr"] * multiplier
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = decay * 0.5 * (1 + math.cos(math.pi * over))
        made[0].step()
        model.zero_grad(set_to_none=True)
        return loss.item()

    def losses(batch: Batch) -> Tensor:
        return model(batch.ids, batch.targets.contiguous(), loss_reduction="none").view(-1).float()

    return Trainee(step, losses, reset, sum(p.numel() for p in model.parameters()))


def ours(config: dict[str, Any]) -> Trainee:
    """A model of the family, trained with the library's own parts."""
    model = LoopedLM(parse(ModelConfig, config, source="benchmarks/bpb.py"))
    model.compile_parts()
    plan = LoopPlan(model.config.n_loops)
    made: list[torch.optim.Optimizer] = []

    def reset() -> None:
        torch.manual_seed(SEED)
        init_weights(model, kind=model.config.init, std=model.config.init_std)
        made[:] = make_optimizers(model, OPTIMIZER)

    def step(batch: Batch, number: int, over: float) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(model, batch, plan)
        loss.backward()
        set_lr_scale(made, SCHEDULE.scale(over))
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.compiler.set_stance("force_eager")
    def losses(batch: Batch) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model.logits(model.hidden(batch.ids, plan=plan))
        return F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none")

    return Trainee(step, losses, reset, sum(p.numel() for p in model.parameters()))


def race(trainee: Trainee, text: BytesSource, held_out: BytesSource, *, name: str, seconds: float) -> dict[str, Any]:
    """Train for `seconds`, score, and say what came of it."""
    trainee.reset()
    for number in range(N_WARM):
        trainee.step(text.batch(number), number, 0.0)
    trainee.reset()
    started, curve, number, over = time.perf_counter(), [], 0, 0.0
    while over < 1:
        loss = trainee.step(text.batch(number), number, over)
        number += 1
        over = (time.perf_counter() - started) / seconds
        curve.append(loss)
        if number % 20 == 0 and sys.stderr.isatty():
            print(f"\r{name}: {over:4.0%}, loss {np.mean(curve[-20:]):.3f}", end="", file=sys.stderr)
    n_tokens = number * N_ROWS * ROW_LEN
    result = {
        "name": name,
        "parameters": trainee.n_parameters,
        "steps": number,
        "tokens": n_tokens,
        "tokens_per_second": n_tokens / seconds,
        "train_bits_per_byte": float(np.mean(curve[-len(curve) // 20 :])) / math.log(2),
        "bits_per_byte": bits_per_byte(trainee.losses, held_out),
    }
    print(
        f"\r{name}: {result['bits_per_byte']:.4f} bits per byte held out, {result['train_bits_per_byte']:.4f} learned, "
        f"{number:,} steps, {result['parameters']:,} parameters",
        flush=True,
    )
    return result


@torch.no_grad()
def bits_per_byte(losses: Callable[[Batch], Tensor], held_out: BytesSource) -> float:
    """Bits per byte of all held-out bytes that whole windows hold, each scored once."""
    nats, n = 0.0, 0
    for index in range(held_out.n_held_out):
        batch = held_out.batch(index)
        nats += float(losses(batch).double().sum())
        n += int((batch.targets != IGNORE).sum())
    return nats / n / math.log(2)


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT")
    parser.add_argument("--nanochat", type=Path, help="a checkout of karpathy/nanochat; without it only ours are run")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run these alone, by the beginning of their names")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    config = BytesConfig(path=str(given.text), n_rows=N_ROWS, row_len=ROW_LEN)
    text, held_out = (BytesSource(config, seed=SEED, held_out=side) for side in (False, True))
    racers: dict[str, Callable[[], Trainee]] = {}
    for rate in RATES if given.nanochat else ():
        racers[f"nanochat, {rate} x"] = lambda rate=rate: nanochat(given.nanochat, rate=rate)
    racers |= {"ours, plain": lambda: ours(PLAIN), "ours, looped": lambda: ours(LOOPED)}
    chosen = [name for name in racers if not given.only or any(name.startswith(word) for word in given.only)]
    results = [race(racers[name](), text, held_out, name=name, seconds=given.seconds) for name in chosen]
    theirs = [each["bits_per_byte"] for each in results if each["name"].startswith("nanochat")]
    for each in results if theirs else ():
        if each["name"].startswith("ours"):
            each["below_nanochat"] = min(theirs) - each["bits_per_byte"]
            print(f"{each['name']}: {each['below_nanochat']:+.4f} bits below nanochat's best (to reach: 0.05)")
    if given.json:
        told = {"tokenizer": "bytes", "seconds": given.seconds, "threads": given.threads, "torch": torch.__version__}
        given.json.write_text(json.dumps(told | {"results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
