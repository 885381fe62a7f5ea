"""What our own form of each system changes: faithful and ours at tiny size, one task, equal training FLOPs.

    python recipes/systems.py run NAME OUT.json [--flops F] [--seed S]     train and score one preset
    python recipes/systems.py table FOLDER                                 a table and docs/systems.png of all results

The task is arithmetic with its worked steps. A run gets as many tokens as the FLOPs pay for at its mean number of
loops; looped presets of both forms train with 1 to 2n - 1 loops, n being the preset's own number. Scored are 50 batches
of held-out questions at several numbers of loops: mean cross-entropy per answer token with its 95 % interval over
batches.
"""

import argparse
import json
import math
import random
from pathlib import Path

import torch

from looplm.checkpoint import load
from looplm.config import load_preset, merge, parse
from looplm.data.pack import IGNORE, Batch, Document, pack
from looplm.data.sources import ReasoningConfig, ReasoningSource
from looplm.data.tasks import REASONING
from looplm.data.tasks.example import is_test_question, render_completion, render_prompt
from looplm.data.tokenizer import PAD_ID, VOCAB_SIZE
from looplm.model.count import count
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.train.run import RunConfig, start_run

PAIRS = {
    "OpenMythos": ("mythos-tiny", "looplm-mythos-tiny"),
    "nanochat": ("nanochat-tiny", "looplm-nanochat-tiny"),
    "Nano-OSRT v3": ("osrt-v3-tiny", "looplm-osrt-v3-tiny"),
    "Nano-OSRT v4": ("osrt-v4-tiny", "looplm-osrt-v4-tiny"),
}
LOOPS = (1, 2, 4, 8, 16)
TASK, ROW_LEN, N_ROWS, N_BATCHES = "arithmetic", 336, 12, 50


def held_out() -> list[Batch]:
    """Batches of questions that training never sees."""
    source = ReasoningSource(ReasoningConfig(weights={TASK: 1}), seed=0)
    rng = random.Random("systems")

    def draw() -> Document:
        while True:
            example = REASONING[TASK].sample(rng)
            if is_test_question(example.question):
                break
        prompt = source.tokenizer.encode(render_prompt(example.question)).ids
        return Document(prompt + source.tokenizer.encode(render_completion(example)).ids, len(prompt))

    return [pack(draw, n_rows=4, row_len=ROW_LEN, pad_id=PAD_ID) for _ in range(N_BATCHES)]


@torch.inference_mode()
def score(model: LoopedLM, batches: list[Batch], *, n_loops: int) -> dict[str, float]:
    """Mean loss and half its 95 % interval, and the share of answer tokens that are the likeliest."""
    losses, right, scored = [], 0, 0
    plan = LoopPlan(n_loops)
    for batch in batches:
        hidden = model.hidden(batch.ids, plan=plan, documents=batch.documents)
        keep = batch.targets != IGNORE
        logits, targets = model.logits(hidden[keep])[:, : model.config.n_targets], batch.targets[keep]
        losses.append(float(torch.nn.functional.cross_entropy(logits, targets)))
        right += int((logits.argmax(-1) == targets).sum())
        scored += len(targets)
    values = torch.tensor(losses)
    half = 1.96 * float(values.std()) / math.sqrt(len(losses))
    return {"loss": float(values.mean()), "half_interval": half, "right": right / scored, "n_tokens": scored}


def run(name: str, out: Path, *, flops: float, seed: int) -> None:
    """Train one preset and score it."""
    model = merge(load_preset("model", name), {"vocab_size": VOCAB_SIZE, "used_vocab": None, "seq_len": 512})
    size = count(parse(ModelConfig, model, source=name))
    tokens = int(flops / size.training_flops_per_token)
    most = 2 * size.n_loops - 1
    config = {
        "model": model,
        "data": {"kind": "reasoning", "weights": {TASK: 1}, "n_rows": N_ROWS, "row_len": ROW_LEN},
        "train": {
            "seed": seed,
            "tokens": tokens,
            "plan": {"kind": "uniform", "low": 1, "high": most},
            "optimizer": {"muon_lr": 0.03, "adamw_lr": 4e-3},
            "schedule": {"warmup": 0.02, "decay": 0.5},
            "runtime": {"device": "cpu", "precision": "fp32", "compile": False, "n_threads": 1},
            "log_every": 50,
        },
    }
    folder = out.with_suffix("")
    start_run(
        parse(RunConfig, config, source=name),
        folder,
        observers=(lambda record: print(name, record["step"], f"{record['loss']:.4f}", flush=True),),
    )
    trained = load(folder)
    batches = held_out()
    loops = LOOPS if size.n_loops > 1 else (1,)
    result = {
        "preset": name,
        "n_loops": size.n_loops,
        "parameters": size.parameters,
        "tokens": tokens,
        "flops": flops,
        "seed": seed,
        "scores": {n: score(trained, batches, n_loops=n) for n in loops},
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for n, each in result["scores"].items():
        print(
            f"{name} {n} loops: {each['loss']:.4f} +- {each['half_interval']:.4f}, "
            f"{100 * each['right']:.2f} % of tokens"
        )


def table(folder: Path) -> None:
    """A markdown table, and a plot of loss against loops."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}
    figure, axes = plt.subplots(1, len(PAIRS), figsize=(13, 3.4), sharey=True)
    print("| preset | parameters | tokens | " + " | ".join(f"loss, {n} loop{'s' * (n > 1)}" for n in LOOPS) + " |")
    print("|---|---|---|" + "---|" * len(LOOPS))
    for axis, (system, names) in zip(axes, PAIRS.items(), strict=True):
        for name, style in zip(names, ("o--", "s-"), strict=True):
            result = found[name]
            cells = []
            for n in LOOPS:
                each = result["scores"].get(str(n))
                mark = "**" if n == result["n_loops"] else ""
                cells.append(f"{mark}{each['loss']:.3f}{mark} ± {each['half_interval']:.3f}" if each else "")
            print(
                f"| `{name}` | {result['parameters']:,} | {result['tokens'] / 1e6:.1f}M | " + " | ".join(cells) + " |"
            )
            loops = [int(n) for n in result["scores"]]
            losses = [each["loss"] for each in result["scores"].values()]
            label = "ours" if name.startswith("looplm") else "faithful"
            axis.plot(loops, losses, style, label=label)
        axis.set_title(system)
        axis.set_xscale("log", base=2)
        axis.set_xticks(LOOPS, [str(n) for n in LOOPS])
        axis.set_xlabel("loops at evaluation")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_yscale("log")
    axes[0].set_ylabel("held-out loss, nats per answer token")
    figure.tight_layout()
    figure.savefig(Path(__file__).parents[1] / "docs" / "systems.png", dpi=120)


def main() -> None:
    """See the module's first lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run")
    runs.add_argument("name")
    runs.add_argument("out", type=Path)
    runs.add_argument("--flops", type=float, default=2e13)
    runs.add_argument("--seed", type=int, default=0)
    verbs.add_parser("table").add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.verb == "run":
        run(arguments.name, arguments.out, flops=arguments.flops, seed=arguments.seed)
    else:
        table(arguments.folder)


if __name__ == "__main__":
    main()
