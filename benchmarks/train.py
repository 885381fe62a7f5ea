"""Training speed: tokens a second of models of 1, 10 and 100 million parameters, plain and looped, beside what the
machine's matrix products reach.

python benchmarks/train.py [--sizes 1m 10m 100m] [--device auto] [--threads 2] [--seconds 20] [--json out.json]

A step is what `looplm train` does: forward, loss, backward, Muon and AdamW, bf16 autocast, compiled blocks; random
tokens, all layers and loops with gradient. FLOPs are counted as `looplm count` counts them, and the machine's rate is
that of a bf16 product of 1,024 cubed (8,192 on a GPU) timed between the rounds. Compiling comes before and is not
counted. On a GPU there is the size nanochat-d12 too; --gpu h100 names its data sheet (one that `looplm plan` knows),
and each line ends in the MFU, the share of the data sheet's rate.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from looplm.config import load_preset, merge, parse
from looplm.data.pack import Batch
from looplm.model.count import count
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.optim.groups import OptimizerConfig, make_optimizers
from looplm.telemetry.meter import matmul_rate
from looplm.train.losses import next_token_loss
from looplm.train.needs import find_gpu

PLAIN = {"n_prelude": 0, "n_coda": 0, "n_core": 4, "n_loops": 1, "inject": {"kind": "none"}}
# size: model preset, what makes it plain, rows and tokens of a step on a CPU and on a GPU
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int], tuple[int, int]]] = {
    "1m": ("looplm-text-1m", PLAIN, (16, 256), (256, 512)),
    "10m": ("looplm-text-10m", PLAIN, (8, 512), (128, 512)),
    "100m": ("looplm-text-100m", PLAIN | {"n_core": 12}, (2, 512), (32, 1024)),
    "nanochat-d12": ("nanochat-d12", {}, (1, 512), (32, 2048)),
}


def trained(config: ModelConfig, shape: tuple[int, int], *, device: str, seconds: float) -> dict[str, Any]:
    """Steps for `seconds`, after those that compile."""
    torch.manual_seed(0)
    model = LoopedLM.on(device, config)
    model.compile_parts()
    optimizers = make_optimizers(model, OptimizerConfig())
    n_rows, n_tokens = shape
    ids = torch.randint(0, config.n_targets, (n_rows, n_tokens + 1), device=device)
    batch, plan = Batch(ids[:, :-1], ids[:, 1:]), LoopPlan(config.n_loops)

    def step() -> float:
        started = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = next_token_loss(model, batch, plan)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss.item()  # a GPU is done with it
        return time.perf_counter() - started

    for _ in range(3):
        step()
    times: list[float] = []
    rates = [matmul_rate(device, torch.bfloat16)]
    for _ in range(2):
        began = time.perf_counter()
        while time.perf_counter() - began < seconds / 2:
            times.append(step())
        rates.append(matmul_rate(device, torch.bfloat16))
    size = count(config.model_copy(update={"seq_len": n_tokens}), n_loops=config.n_loops)
    taken, rate = statistics.median(times), statistics.median(rates)
    flops = size.training_flops_per_token * n_rows * n_tokens / taken
    return {
        "parameters": size.parameters,
        "n_loops": config.n_loops,
        "tokens_a_step": n_rows * n_tokens,
        "steps": len(times),
        "tokens_per_second": n_rows * n_tokens / taken,
        "flops_per_second": flops,
        "matmul_rate": rate,
        "share_of_matmul_rate": flops / rate,
    }


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=CASES, help="default: 1m 10m 100m, on a GPU nanochat-d12 too")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--gpu", help="as `looplm plan` knows it, for the MFU")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="of steps for each model")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, and torch sees no GPU")
    peak = find_gpu(given.gpu).tflops * 1e12 if given.gpu else None
    has_gpu = torch.cuda.is_available() and given.device != "cpu"
    device = "cuda" if has_gpu else "cpu"
    hardware = torch.cuda.get_device_name() if has_gpu else f"{given.threads} CPU threads"
    print(f"{hardware}, torch {torch.__version__}")
    results = {}
    for size in given.sizes or list(CASES)[: 4 if has_gpu else 3]:
        preset, plain, on_cpu, on_gpu = CASES[size]
        looped = load_preset("model", preset)
        forms = {"looped": looped, "plain": merge(looped, plain)} if plain else {"plain": looped}
        for form, data in forms.items():
            shape = on_gpu if has_gpu else on_cpu
            config = parse(ModelConfig, data | {"seq_len": shape[1]}, source=preset)
            found = results[f"{size}, {form}"] = trained(config, shape, device=device, seconds=given.seconds)
            print(
                f"{size}, {form}: {found['parameters']:,} parameters, {found['n_loops']} loops, "
                f"{found['tokens_per_second']:,.0f} tokens/s, {found['flops_per_second'] / 1e12:.3f} TFLOP/s, "
                f"{found['share_of_matmul_rate']:.0%} of the machine's {found['matmul_rate'] / 1e12:.2f}"
                + ("" if peak is None else f", MFU {found['flops_per_second'] / peak:.0%}"),
                flush=True,
            )
    if given.json:
        told = {"hardware": hardware, "torch": torch.__version__, "results": results}
        given.json.write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
