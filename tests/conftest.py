"""Small models and one thread: on shared cores OpenMP's spinning costs more than it gains."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from looplm.config import apply_overrides, parse
from looplm.model.looped import LoopedLM, ModelConfig

torch.set_num_threads(1)
# A shell's background jobs, and with them these tests and what they start, begin with these ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

TINY: dict[str, Any] = {
    "vocab_size": 40,
    "d_model": 16,
    "seq_len": 64,
    "n_prelude": 1,
    "n_core": 2,
    "n_coda": 1,
    "n_loops": 2,
    "block": {
        "attention": {"kind": "gqa", "n_heads": 4, "n_kv_heads": 2, "head_dim": 8},
        "ffn": {"kind": "swiglu", "d_ff": 24},
    },
    "inject": {"kind": "none"},
    "init": "normal",
    "init_std": 0.2,  # large enough that every part matters to the logits
}

# One run of each choice that changes a forward; every exactness test goes through all of them.
VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "add": ["inject.kind=add"],
    "gate": ["inject.kind=gate"],
    "diagonal": ["inject={kind: diagonal, output_map: true}"],
    "qk-norm": ["block.attention.qk_norm=before_rope"],
    "window": ["block.attention.window=3"],
    "relu2": ["block.ffn={kind: relu2, d_ff: 24}"],
    "low-rank": ["block.linear={kind: low_rank, rank: 4}"],
    "smear": ["smear={kind: channel, n_back: 2}"],
    "untied": ["tied_head=false", "n_outputs=11"],
    "fused": ["block.attention.fused_qkv=true"],
    "qk-norm-after": [
        "block.attention={kind: gqa, qk_norm: after_rope, qk_gain: 1.2, n_heads: 2, n_kv_heads: 1, head_dim: 8}"
    ],
    "interleaved-ntk": ["block.attention.rope={pairing: interleaved, ntk_factor: 2, base: 100}"],
    "windows": ["block.attention.window=3", "block.attention.window_pattern=SL"],
    "value-embed": ["block.attention.value_embed={n_channels: 4}"],
    "mla": ["block.attention={kind: mla, n_heads: 2, q_rank: 8, kv_rank: 6, nope_dim: 4, rope_dim: 4, v_dim: 6}"],
    "moe": ["core_ffn={kind: moe, n_experts: 4, d_ff: 8, top_k: 2, n_shared: 1, has_bias: true}"],
    "moe-loops": ["core_ffn={kind: moe, n_experts: 4, d_ff: 8, top_k: 2, gate: sigmoid, n_loop_embeds: 3}"],
    "parallel": ["block.ffn={kind: parallel, d_ff: 16, moe: {n_experts: 4, d_ff: 8, top_k: 1}}"],
    "hra": ["block.linear={kind: hra, rank: 4, scale: 0.3}"],
    "weightless": ["block.norm_weight=false", "embed_norm=true"],
    "scales": ["block.stream_scales=true", "backout=true"],
    "gate-smear": ["smear={kind: gate, n_channels: 6}"],
    "softcap": ["softcap=3", "vocab_multiple=16"],
    "adapter": ["adapter={rank: 2, n_loops: 2}", "loop_norm=true"],
    "loop-lora": ["loop_lora={rank: 2, n_loops: 2, max_scale: 0.3}"],
    "lti": ["inject.kind=lti"],
    "lti-act": ["inject={kind: lti, loop_embed: raw, bounded_decay: false}", "exit={kind: act, renormalise: false}"],
    "act": ["inject.kind=add", "exit={kind: act, ponder_cost: 0.01, threshold: 0.7}"],
    "core-only": ["n_prelude=0", "n_coda=0", "inject.kind=diagonal"],
}
TEXT_VARIANTS = [name for name in VARIANTS if name != "untied"]
"""Those whose outputs are their input tokens, so that they can continue a text."""


def long(*cases: tuple[Any, ...]) -> list[Any]:
    """Cases of a test that only `make test-all` runs."""
    return [pytest.param(*case, marks=pytest.mark.long) for case in cases]


def crossed(names: Iterable[str], others: Sequence[Any]) -> list[Any]:
    """Every variant with each of the others. Quick are all variants with the first of them, and `plain` with all."""
    pairs = [(name, other) for name in names for other in others]
    quick = [(name, other) for name, other in pairs if other == others[0] or name == "plain"]
    return [*quick, *long(*(pair for pair in pairs if pair not in quick))]


def tiny_config(*overrides: str) -> ModelConfig:
    return parse(ModelConfig, apply_overrides(TINY, overrides), source="tiny")


@pytest.fixture
def make_model() -> Callable[..., LoopedLM]:
    def make(*overrides: str, seed: int = 0) -> LoopedLM:
        torch.manual_seed(seed)
        model = LoopedLM(tiny_config(*overrides))
        for name, parameter in model.named_parameters():
            if parameter.count_nonzero() == 0:  # parts that start as the identity would test nothing
                torch.nn.init.normal_(parameter, std=0.5 if "norm" not in name else 0.1)
        return model.eval()

    return make


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, make_model: Callable[..., LoopedLM]) -> LoopedLM:
    return make_model(*VARIANTS[request.param])


@pytest.fixture(params=TEXT_VARIANTS)
def text_variant(request: pytest.FixtureRequest, make_model: Callable[..., LoopedLM]) -> LoopedLM:
    return make_model(*VARIANTS[request.param])


@pytest.fixture
def tiny_reason(tmp_path: Path) -> list[str]:
    """Overrides that make `reason` a run of seconds."""
    return [
        "model.d_model=32",
        "model.block.attention={kind: gqa, n_heads: 2, n_kv_heads: 2, head_dim: 16}",
        "model.block.ffn.d_ff=32",
        "data.n_rows=2",
        "train.minutes=null",
        "train.steps=6",
        "train.n_workers=0",
        "train.log_every=1",
        "train.runtime={device: cpu, precision: fp32, compile: false, n_threads: 1}",
    ]
