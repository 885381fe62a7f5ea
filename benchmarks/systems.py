"""Ours against the originals: the same config, weights, machine and threads; training steps and decoding, as ratios.

    python benchmarks/systems.py --mythos PATH --nanochat PATH --osrt PATH [--threads 2] [--json out.json]

PATH is a checkout of kyegomez/OpenMythos, karpathy/nanochat or CodeHalwell/nano-osrt-100m (at cd8a10f); OpenMythos
and Nano-OSRT v4 need `pip install transformers`, nanochat `pip install rustbpe tiktoken`. A system whose path is not
given is left out. Before anything is timed, the two models' logits are compared. Training: theirs is timed in every
mode that it runs in, and the fastest counts; ours, compiled, in the faster of bf16 autocast and fp32, as `looplm train`
chooses for minutes of training on a CPU; a step is forward, cross-entropy over all positions, backward and one AdamW
update with torch's fused kernel, for both. Decoding: theirs as its own generate runs it, which none of them compiles;
ours as `looplm generate --compile` runs. Nanochat is timed in bf16 and in fp32; against bf16, ours too is in the faster
of the two. Compiling is not timed, neither theirs nor ours. Theirs and ours take turns, and a ratio is the median over
the rounds.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from looplm.data.pack import Batch
from looplm.hf.convert import load_foreign
from looplm.infer.engine import generate
from looplm.infer.sampling import SamplingConfig
from looplm.model.count import count
from looplm.model.layer_inputs import Asides
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM
from looplm.telemetry.meter import matmul_rate
from looplm.train.losses import next_token_loss

N_PROMPT, N_NEW = 32, 64
SAMPLING = SamplingConfig(temperature=1.0, top_k=50)


@dataclass
class Case:
    """One original and the same model of ours."""

    name: str
    theirs: nn.Module
    ours: LoopedLM
    n_loops: int
    shape: tuple[int, int]  # rows and tokens of a training batch
    their_loss: Callable[[Tensor, Tensor], Tensor]
    their_logits: Callable[[Tensor], Tensor]
    their_decode: Callable[[Tensor], object]
    modes: tuple[str, ...] = ("fp32", "fp32 compiled", "bf16", "bf16 compiled")
    targets: tuple[float, float] = (1.0, 1.0)  # training and decode ratios to reach
    tolerance: float = 2e-4  # of the logits; nanochat computes in bf16
    decode_dtypes: tuple[torch.dtype, ...] = (torch.float32,)  # what ours may decode in
    has_one_prompt: bool = False  # theirs continues one prompt, as often as asked


def mythos(path: Path, *, n_experts: int, top_k: int) -> Case:
    sys.path.insert(0, str(path))
    from open_mythos.main import MythosConfig, OpenMythos

    fields = {
        "vocab_size": 4096,
        "dim": 256,
        "n_heads": 8,
        "n_kv_heads": 2,
        "max_seq_len": 256,
        "max_loop_iters": 8,
        "prelude_layers": 1,
        "coda_layers": 1,
        "attn_type": "mla",
        "kv_lora_rank": 64,
        "q_lora_rank": 128,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "n_experts": n_experts,
        "n_shared_experts": 1,
        "n_experts_per_tok": top_k,
        "expert_dim": 128,
        "act_threshold": 0.99,
        "rope_theta": 500000.0,
        "lora_rank": 8,
    }
    theirs = OpenMythos(MythosConfig(**fields))
    n_loops = fields["max_loop_iters"]
    return Case(
        f"OpenMythos, {n_experts} experts",
        theirs,
        load_foreign("openmythos", theirs.state_dict(), fields),
        n_loops,
        (8, 128),
        lambda ids, targets: F.cross_entropy(theirs(ids, n_loops=n_loops).flatten(0, 1), targets.flatten()),
        lambda ids: theirs(ids, n_loops=n_loops),
        lambda prompt: theirs.generate(prompt, max_new_tokens=N_NEW, n_loops=n_loops, temperature=1.0, top_k=50),
        targets=(3.0, 5.0),
    )


class NoTokenizer:
    """What nanochat's engine asks of a tokenizer when nothing special is sampled."""

    def encode_special(self, name: str) -> int:
        return -1

    def get_bos_token_id(self) -> int:
        return -1


def nanochat(path: Path, dtype: str) -> Case:
    os.environ["NANOCHAT_DTYPE"] = dtype  # read where it is imported
    for name in [name for name in sys.modules if name.partition(".")[0] == "nanochat"]:
        del sys.modules[name]
    sys.path.insert(0, str(path))
    from nanochat.engine import Engine
    from nanochat.gpt import GPT, GPTConfig

    fields = {
        "sequence_len": 512,
        "vocab_size": 4096,
        "n_layer": 4,
        "n_head": 2,
        "n_kv_head": 2,
        "n_embd": 256,
        "window_pattern": "SSSL",
    }
    theirs = GPT(GPTConfig(**fields))
    theirs.init_weights()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.count_nonzero() == 0:
                parameter.normal_(std=0.02)
    engine = Engine(theirs, NoTokenizer())

    def decode(prompt: Tensor) -> object:
        return list(engine.generate(prompt[0].tolist(), len(prompt), max_tokens=N_NEW, temperature=1.0, top_k=50))

    state = {name: tensor.float() for name, tensor in theirs.state_dict().items()}
    in_bf16 = dtype == "bfloat16"
    return Case(
        f"nanochat d4, {'bf16' if in_bf16 else 'fp32'}",
        theirs,
        load_foreign("nanochat", state, fields),
        1,
        (4, 512),
        lambda ids, targets: theirs(ids, targets),
        lambda ids: theirs(ids),
        decode,
        modes=("own", "own compiled"),  # its bf16 is its own, by NANOCHAT_DTYPE
        decode_dtypes=(torch.float32, torch.bfloat16) if in_bf16 else (torch.float32,),
        targets=(1.3, 3.0),
        tolerance=0.1 if in_bf16 else 2e-4,
        has_one_prompt=True,
    )


OSRT_SHAPE = {"dim": 256, "heads": 4, "head_dim": 64, "vocab_size": 4096, "real_vocab_size": 4096}


def recomputing(step: Callable[[Tensor], Tensor]) -> Callable[[Tensor], object]:
    """Decoding as Nano-OSRT does it, the whole context for every token, for any number of rows."""

    @torch.no_grad()
    def decode(prompt: Tensor) -> object:
        ids = prompt
        for _ in range(N_NEW):
            logits = step(ids)[:, -1].float()
            kept = logits.topk(50).values[:, -1:]
            probabilities = logits.masked_fill(logits < kept, -torch.inf).softmax(-1)
            ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
        return ids

    return decode


def osrt_v3(path: Path) -> Case:
    sys.path.insert(0, str(path / "src"))
    from nano_osrt.modal_config import ModalConfig
    from nano_osrt.recursive_model import RecursiveNanoOSRT

    config = ModalConfig()
    fields = OSRT_SHAPE | {"seq_len": 512, "num_blocks": 2, "recursive_loops": 6, "adapter_rank": 16}
    for name, value in fields.items():
        setattr(config, name, value)
    theirs = RecursiveNanoOSRT(config)
    ours = load_foreign(
        "osrt",
        theirs.state_dict(),
        fields | {"adapter_alpha": 16.0, "rope_theta": 10000.0, "ffn_hidden": theirs.blocks[0].ffn.w_gate.out_features},
    )
    return Case(
        "Nano-OSRT v3",
        theirs,
        ours,
        6,
        (4, 256),
        lambda ids, targets: F.cross_entropy(theirs(ids)[0].float().flatten(0, 1), targets.flatten()),
        lambda ids: theirs(ids)[0],
        recomputing(lambda ids: theirs(ids)[0]),
        targets=(1.5, 5.0),
    )


def osrt_v4(path: Path) -> Case:
    sys.path.insert(0, str(path / "src"))
    from nano_osrt.v4_config import NanoOSRTv4Config
    from nano_osrt.v4_model import NanoOSRTv4ForCausalLM

    fields = OSRT_SHAPE | {
        "num_blocks": 3,
        "recursive_loops": 6,
        "adapter_rank": 16,
        "adapter_alpha": 16.0,
        "dense_hidden": 704,
        "num_experts": 12,
        "num_shared_experts": 1,
        "num_routed_experts": 11,
        "top_k_experts": 2,
        "expert_hidden": 192,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "router_aux_loss_coeff": 0.01,
        "router_z_loss_coeff": 0.001,
    }
    theirs = NanoOSRTv4ForCausalLM(NanoOSRTv4Config(**fields))
    theirs.train()

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        return theirs(ids, labels=ids).loss  # it shifts the labels itself, and adds its router losses

    return Case(
        "Nano-OSRT v4",
        theirs,
        load_foreign("osrt", theirs.state_dict(), fields),
        6,
        (4, 256),
        loss,
        lambda ids: theirs(ids).logits,
        recomputing(lambda ids: theirs(ids).logits),
        targets=(3.0, 5.0),
    )


def autocast(mode: str) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16) if mode.startswith("bf16") else nullcontext()


def trainer(model: nn.Module, loss: Callable[[], Tensor], mode: str) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with autocast(mode):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def set_mode(model: nn.Module, mode: str) -> None:
    """Compiled as a whole, or not."""
    model._compiled_call_impl = None  # what nn.Module.compile sets, and nothing public takes back
    if "compiled" in mode:
        model.compile(dynamic=False)


def seconds(job: Callable[[], object]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def fastest_of_three(job: Callable[[], object]) -> float:
    """Seconds, after two that do not count."""
    job(), job()
    return min(seconds(job) for _ in range(3))


def compare(theirs: Callable[[], object], ours: Callable[[], object], *, rounds: int) -> dict[str, Any]:
    """Both in turns: the median of each, and of the ratios."""
    pairs = [(seconds(theirs), seconds(ours)) for _ in range(rounds)]
    return {
        "theirs_s": statistics.median(pair[0] for pair in pairs),
        "ours_s": statistics.median(pair[1] for pair in pairs),
        "ratio": statistics.median(pair[0] / pair[1] for pair in pairs),
    }


def measure_decoding(case: Case, *, rounds: int, generator: torch.Generator) -> dict[str, Any]:
    """One text and 16 at once."""
    result: dict[str, Any] = {}

    def our_decode(decoder: LoopedLM, prompt: Tensor) -> object:
        options: dict[str, Any] = {"max_new_tokens": N_NEW, "n_loops": case.n_loops, "sampling": SAMPLING}
        return generate(decoder, prompt.tolist(), eos_id=-1, **options)

    def their_decode(prompt: Tensor) -> object:
        with torch.inference_mode():
            return case.their_decode(prompt)

    for n_prompts in (1, 16):
        prompt = torch.randint(0, 4000, (n_prompts, N_PROMPT), generator=generator)
        prompt = prompt[:1].repeat(n_prompts, 1) if case.has_one_prompt else prompt
        decoders: list[LoopedLM] = []
        for dtype in case.decode_dtypes:
            decoders.append(copy.deepcopy(case.ours).eval().to(dtype))
            decoders[-1].compile_decoding(n_rows=n_prompts)
        theirs, ours = partial(their_decode, prompt), [partial(our_decode, decoder, prompt) for decoder in decoders]
        theirs()
        fastest = min(ours, key=fastest_of_three)
        numbers = compare(theirs, fastest, rounds=rounds)
        numbers["our_dtype"] = str(case.decode_dtypes[ours.index(fastest)])
        result[f"decode_{n_prompts}"] = numbers
        show(f"{case.name}: decode {n_prompts} (ours {numbers['our_dtype']})", numbers, target=case.targets[1])
    return result


def measure(case: Case, *, parts: list[str], rounds: int, compiles: bool, rates: dict[str, float]) -> dict[str, Any]:
    """All ratios of one system."""
    generator = torch.Generator().manual_seed(0)
    n_rows, n_tokens = case.shape
    ids = torch.randint(0, 4000, (n_rows, n_tokens + 1), generator=generator)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    case.theirs.eval()
    with torch.no_grad():
        error = float((case.their_logits(inputs).float() - case.ours(inputs, n_loops=case.n_loops).logits).abs().max())
    if error > case.tolerance:
        sys.exit(f"{case.name}: the two models differ by {error:.2g}; nothing was timed")
    result: dict[str, Any] = {"system": case.name, "largest_logit_difference": error}

    if "decode" in parts:
        result |= measure_decoding(case, rounds=rounds, generator=generator)
    if "train" not in parts:
        return result
    case.theirs.train(), case.ours.train()
    best, best_mode, best_time = None, "", float("inf")
    for mode in case.modes if compiles else [mode for mode in case.modes if "compiled" not in mode]:
        torch._dynamo.reset()
        set_mode(case.theirs, mode)
        job = trainer(case.theirs, lambda: case.their_loss(inputs, targets), mode)
        try:
            took = fastest_of_three(job)
        except Exception as error:  # whatever a mode of theirs dies of is its result
            print(f"  theirs, {mode}: does not run ({type(error).__name__})")
            continue
        print(f"  theirs, {mode}: {1000 * took:.0f} ms a step")
        if took < best_time:
            best, best_mode, best_time = job, mode, took
    assert best is not None
    torch._dynamo.reset()
    set_mode(case.theirs, best_mode)
    best()
    best()
    case.ours.compile_parts()
    batch, plan = Batch(inputs, targets), LoopPlan(case.n_loops)
    by_mode = {
        mode: trainer(case.ours, lambda: next_token_loss(case.ours, batch, plan), mode) for mode in ("bf16", "fp32")
    }
    our_mode = min(by_mode, key=lambda mode: fastest_of_three(by_mode[mode]))
    step = compare(best, by_mode[our_mode], rounds=2 * rounds)
    states: list[Tensor] = []  # halting ends the loop early, for both
    case.ours.hidden(inputs, plan=plan, asides=Asides(), states=states)
    flops = count(case.ours.config, n_loops=len(states)).training_flops_per_token * inputs.numel()
    share = flops / step["ours_s"] / rates[our_mode]
    step |= {"their_mode": best_mode, "our_mode": our_mode, "share_of_matmul_rate": share}
    result["train"] = step
    show(f"{case.name}: train (theirs {best_mode}, ours {our_mode} compiled)", step, target=case.targets[0])
    print(f"  ours runs at {100 * share:.0f} % of the machine's {our_mode} matmul rate")
    return result


def show(name: str, numbers: dict[str, Any], *, target: float) -> None:
    print(
        f"{name}: {1000 * numbers['theirs_s']:.0f} ms theirs, {1000 * numbers['ours_s']:.0f} ms ours, "
        f"{numbers['ratio']:.2f} times (to reach: {target:g})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("mythos", "nanochat", "osrt"):
        parser.add_argument(f"--{name}", type=Path, help="path of the original's checkout")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="part of a case's name: time only those")
    parser.add_argument("--parts", nargs="+", choices=("decode", "train"), default=["decode", "train"])
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled modes of theirs")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases: list[tuple[str, Callable[[], Case]]] = []
    if arguments.mythos:
        cases += [
            ("OpenMythos, 8 experts", lambda: mythos(arguments.mythos, n_experts=8, top_k=2)),
            ("OpenMythos, 64 experts", lambda: mythos(arguments.mythos, n_experts=64, top_k=4)),
        ]
    if arguments.nanochat:
        cases += [
            ("nanochat d4, bf16", lambda: nanochat(arguments.nanochat, "bfloat16")),
            ("nanochat d4, fp32", lambda: nanochat(arguments.nanochat, "float32")),
        ]
    if arguments.osrt:
        cases += [
            ("Nano-OSRT v3", lambda: osrt_v3(arguments.osrt)),
            ("Nano-OSRT v4", lambda: osrt_v4(arguments.osrt)),
        ]
    if not cases:
        parser.error("give at least one of --mythos, --nanochat, --osrt")
    rates = {name: matmul_rate("cpu", dtype) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    print(f"{arguments.threads} threads; 1024-cubed products: {rates['bf16'] / 1e9:.0f} GFLOP/s in bf16, ", end="")
    print(f"{rates['fp32'] / 1e9:.0f} in fp32", flush=True)
    results = []
    for name, build in cases:
        if arguments.only is None or arguments.only in name:
            torch.manual_seed(0)
            compiles = not arguments.no_compile
            results.append(
                measure(build(), parts=arguments.parts, rounds=arguments.rounds, compiles=compiles, rates=rates)
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
