"""Small models and one thread: on shared cores OpenMP's spinning costs more than it gains."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from looplm.config import apply_overrides, parse
from looplm.model.looped import LoopedLM, ModelConfig

torch.set_num_threads(1)

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
    "qk-norm": ["block.attention.qk_norm=true"],
    "window": ["block.attention.window=3"],
    "relu2": ["block.ffn={kind: relu2, d_ff: 24}"],
    "low-rank": ["block.linear={kind: low_rank, rank: 4}"],
    "smear": ["smear=2"],
    "untied": ["tied_head=false", "n_outputs=11"],
    "core-only": ["n_prelude=0", "n_coda=0", "inject.kind=diagonal"],
}


def tiny_config(*overrides: str) -> ModelConfig:
    return parse(ModelConfig, apply_overrides(TINY, overrides), source="tiny")


@pytest.fixture
def make_model() -> Callable[..., LoopedLM]:
    def make(*overrides: str, seed: int = 0) -> LoopedLM:
        torch.manual_seed(seed)
        model = LoopedLM(tiny_config(*overrides))
        if model.smear is not None:
            torch.nn.init.normal_(model.smear.weight)  # it starts as the identity, which would test nothing
        return model.eval()

    return make


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, make_model: Callable[..., LoopedLM]) -> LoopedLM:
    return make_model(*VARIANTS[request.param])


@pytest.fixture(params=[name for name in VARIANTS if name != "untied"])
def text_variant(request: pytest.FixtureRequest, make_model: Callable[..., LoopedLM]) -> LoopedLM:
    """Variants whose outputs are their input tokens, so that they can continue a text."""
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
