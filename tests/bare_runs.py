"""Run folders of weights without training state, made at once: what `looplm generate` and its like read."""

from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save_model

from looplm.config import parse
from looplm.model.looped import LoopedLM, ModelConfig


def bare_run(folder: Path, model: LoopedLM, *, data: dict[str, Any]) -> str:
    """A folder of this model; `data` says what it was trained on."""
    folder.mkdir()
    plain = {"model": model.config.model_dump(mode="json"), "data": data}
    (folder / "config.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    save_model(model, str(folder / "model.safetensors"))
    return str(folder)


def tiny(**changes: Any) -> LoopedLM:
    """A model of two loops and fresh weights."""
    block = {"attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 2, "head_dim": 8}}
    block["ffn"] = {"kind": "swiglu", "d_ff": 16}
    plain = {"vocab_size": 512, "d_model": 16, "seq_len": 128, "n_core": 1, "n_loops": 2, "block": block}
    return LoopedLM(parse(ModelConfig, plain | changes, source="a test"))
