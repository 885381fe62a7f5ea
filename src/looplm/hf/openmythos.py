"""OpenMythos 0.4 (spec page mythos): prelude, one looped layer of experts with injection, LoRA and ACT, coda."""

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import PositiveFloat, model_validator
from torch import Tensor

from looplm.config import parse
from looplm.errors import CheckpointError
from looplm.hf.original import Count, CountOrNone, OriginalConfig, Size
from looplm.hf.rules import Rule, same, stacked
from looplm.model.attention import GQAConfig
from looplm.model.block import BlockConfig
from looplm.model.ffn import SwiGLUConfig
from looplm.model.loop.adapter import LoopLoRAConfig
from looplm.model.loop.exit import ACTConfig
from looplm.model.loop.inject import LTIInjectConfig
from looplm.model.looped import ModelConfig
from looplm.model.mla import MLAConfig
from looplm.model.moe import MoEConfig
from looplm.model.rope import RopeConfig

# Recomputed from the config, or tied: in their files, not in ours.
DERIVED = ("freqs_cis", "freqs_cis_mla", "head.weight")


class MythosConfig(OriginalConfig):
    """OpenMythos's MythosConfig, its defaults and names."""

    shapeless = frozenset({"max_seq_len", "act_threshold", "rope_theta"})
    vocab_size: Size = 32000
    """Tokens."""
    dim: Size = 2048
    """Width of the stream."""
    n_heads: Count = 16
    """Query heads."""
    n_kv_heads: Count = 4
    """Key and value heads of grouped attention."""
    max_seq_len: Size = 4096
    """Positions with a rotation."""
    max_loop_iters: Count = 16
    """Loops, and scales of the LoRA."""
    prelude_layers: CountOrNone = 2
    """Layers before the loop."""
    coda_layers: CountOrNone = 2
    """Layers after it."""
    attn_type: Literal["gqa", "mla"] = "mla"
    """Grouped or latent attention."""
    kv_lora_rank: Size = 512
    """Latent width of keys and values."""
    q_lora_rank: Size = 1536
    """Latent width of queries."""
    qk_rope_head_dim: Size = 64
    """Turned channels of a latent head; a table of their rotations is there with grouped attention too."""
    qk_nope_head_dim: Size = 128
    """Unturned channels of a latent head."""
    v_head_dim: Size = 128
    """Value channels of a latent head."""
    n_experts: Count = 64
    """Experts to choose from."""
    n_shared_experts: CountOrNone = 2
    """Experts that every token goes through."""
    n_experts_per_tok: Count = 4
    """Experts a token chooses."""
    expert_dim: Size = 512
    """Inner width of one."""
    act_threshold: float = 0.99
    """Summed probability at which a position halts."""
    rope_theta: PositiveFloat = 500000.0
    """Base wavelength."""
    lora_rank: Size = 16
    """Rank of the loops' LoRA."""

    @property
    def unused(self) -> frozenset[str]:
        latent = {"kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"}
        return frozenset({"n_kv_heads"} if self.attn_type == "mla" else latent)

    @model_validator(mode="after")
    def _heads_fit(self) -> "MythosConfig":
        if self.dim % self.n_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of n_heads {self.n_heads}")
        return self


def original_config(fields: Mapping[str, Any], state: Mapping[str, Tensor]) -> MythosConfig:
    """OpenMythos's own config. `fields` may leave some out; the weights add none."""
    return parse(MythosConfig, fields, source="the openmythos config")


def model_config(original: MythosConfig) -> ModelConfig:
    """Our config for one of OpenMythos's."""
    d_model, n_heads = original.dim, original.n_heads
    rope = RopeConfig(base=original.rope_theta, pairing="interleaved")
    attention = (
        MLAConfig(
            n_heads=n_heads,
            q_rank=original.q_lora_rank,
            kv_rank=original.kv_lora_rank,
            nope_dim=original.qk_nope_head_dim,
            rope_dim=original.qk_rope_head_dim,
            v_dim=original.v_head_dim,
            rope=rope,
        )
        if original.attn_type == "mla"
        else GQAConfig(n_heads=n_heads, n_kv_heads=original.n_kv_heads, head_dim=d_model // n_heads, rope=rope)
    )
    n_loops, top_k = original.max_loop_iters, original.n_experts_per_tok
    return ModelConfig(
        vocab_size=original.vocab_size,
        d_model=d_model,
        seq_len=original.max_seq_len,
        n_prelude=original.prelude_layers,
        n_core=1,
        n_coda=original.coda_layers,
        n_loops=n_loops,
        block=BlockConfig(attention=attention, ffn=SwiGLUConfig(d_ff=4 * d_model // 3), norm_eps=1e-6),
        core_ffn=MoEConfig(
            n_experts=original.n_experts,
            d_ff=original.expert_dim,
            top_k=top_k,
            n_shared=original.n_shared_experts,
            shared_d_ff=original.expert_dim * top_k,
            has_bias=True,
        ),
        inject=LTIInjectConfig(loop_embed="raw", bounded_decay=False),
        loop_lora=LoopLoRAConfig(rank=original.lora_rank, n_loops=n_loops),
        exit=ACTConfig(threshold=original.act_threshold, renormalise=False),
        init="normal",
        init_std=0.02,
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Which tensor is which."""
    table = [
        same("embed.weight", "embed.weight"),
        same("norm.weight", "norm.weight"),
        same("inject.norm.weight", "recurrent.norm.weight"),
        same("inject.log_A", "recurrent.injection.log_A"),
        same("inject.log_dt", "recurrent.injection.log_dt"),
        same("inject.gain", "recurrent.injection.B"),
        same("exit.halt.weight", "recurrent.act.halt.weight"),
        same("exit.halt.bias", "recurrent.act.halt.bias"),
        same("loop_lora.down.weight", "recurrent.lora.down.weight"),
        same("loop_lora.scale.weight", "recurrent.lora.scale.weight"),
        same("loop_lora.b", "recurrent.lora.B"),
    ]
    places = [(f"prelude.{layer}", f"prelude.{layer}") for layer in range(config.n_prelude)]
    places += [("core.0", "recurrent.block")]
    places += [(f"coda.{layer}", f"coda.{layer}") for layer in range(config.n_coda)]
    for ours, theirs in places:
        table += [
            same(f"{ours}.attention_norm.weight", f"{theirs}.attn_norm.weight"),
            same(f"{ours}.ffn_norm.weight", f"{theirs}.ffn_norm.weight"),
            *_attention_rules(config, f"{ours}.attention", f"{theirs}.attn"),
        ]
        if ours != "core.0":
            table += [same(f"{ours}.ffn.{part}.weight", f"{theirs}.ffn.{part}.weight") for part in PARTS]
    moe = config.core_ffn
    assert isinstance(moe, MoEConfig)
    theirs = "recurrent.block.ffn"
    table += [same("core.0.ffn.router.weight", f"{theirs}.router.weight")]
    table += [same("core.0.ffn.bias", f"{theirs}.router_bias")]
    for part in PARTS:
        names = [f"{theirs}.routed_experts.{index}.{part}.weight" for index in range(moe.n_experts)]
        table += [stacked(f"core.0.ffn.{part}.weight", names, transposed=True)]
        table += [
            same(f"core.0.ffn.shared.{index}.{part}.weight", f"{theirs}.shared_experts.{index}.{part}.weight")
            for index in range(moe.n_shared)
        ]
    return table


PARTS = ("gate", "up", "down")


def _attention_rules(config: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    if isinstance(config.block.attention, MLAConfig):
        names = ("q_down", "q_norm", "q_up_nope", "q_up_rope", "kv_down", "kv_norm", "kv_up")
        table = [same(f"{ours}.{name}.weight", f"{theirs}.{name}.weight") for name in names]
    else:
        table = [same(f"{ours}.{name}.weight", f"{theirs}.w{name}.weight") for name in "qkv"]
    return [*table, same(f"{ours}.o.weight", f"{theirs}.wo.weight")]


def rope_buffers(fields: Mapping[str, Any]) -> dict[str, Tensor]:
    """The rotation tables that OpenMythos keeps among its weights and expects in a checkpoint."""
    original = original_config(fields, {})
    widths = {"freqs_cis": original.dim // original.n_heads, "freqs_cis_mla": original.qk_rope_head_dim}
    positions = torch.arange(original.max_seq_len, dtype=torch.float32)
    tables = {}
    for name, width in widths.items():
        angles = torch.outer(
            positions, original.rope_theta ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
        )
        tables[name] = torch.polar(torch.ones_like(angles), angles)
    return tables


def clean(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The learned tensors."""
    return {name: tensor for name, tensor in state.items() if name not in DERIVED}


def config_of_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of a bare state dict, but for what leaves no trace: the halting threshold, and without shared experts
    how many a token chooses."""
    missing = [name for name in ("freqs_cis", "embed.weight", "recurrent.block.ffn.router.weight") if name not in state]
    if missing:
        raise CheckpointError(f"no OpenMythos weights: {', '.join(missing)} missing; name the right system")
    table = state["freqs_cis"]
    d_model, head_dim = state["embed.weight"].shape[1], 2 * table.shape[1]
    attention = "recurrent.block.attn"
    is_mla = f"{attention}.kv_down.weight" in state
    n_heads = d_model // head_dim
    moe = "recurrent.block.ffn"
    expert_dim = state[f"{moe}.routed_experts.0.gate.weight"].shape[0]
    n_shared = _count(state, rf"{moe}.shared_experts.(\d+).gate.weight")
    config = {
        "vocab_size": state["embed.weight"].shape[0],
        "dim": d_model,
        "n_heads": n_heads,
        "max_seq_len": table.shape[0],
        "max_loop_iters": state["recurrent.lora.scale.weight"].shape[0],
        "prelude_layers": _count(state, r"prelude.(\d+).attn_norm.weight"),
        "coda_layers": _count(state, r"coda.(\d+).attn_norm.weight"),
        "attn_type": "mla" if is_mla else "gqa",
        "n_experts": state[f"{moe}.router.weight"].shape[0],
        "n_shared_experts": n_shared,
        "expert_dim": expert_dim,
        # angle of position 1 in the second pair is theta^(-2 / head_dim)
        "rope_theta": float(table[1, 1].angle().double() ** (-head_dim / 2)),
        "lora_rank": state["recurrent.lora.B"].shape[0],
    }
    if n_shared:
        config["n_experts_per_tok"] = state[f"{moe}.shared_experts.0.gate.weight"].shape[0] // expert_dim
    if "freqs_cis_mla" in state:
        config["qk_rope_head_dim"] = 2 * state["freqs_cis_mla"].shape[1]
    if not is_mla:
        return config | {"n_kv_heads": state[f"{attention}.wk.weight"].shape[0] // head_dim}
    rope_dim = state[f"{attention}.q_up_rope.weight"].shape[0] // n_heads
    nope_dim = state[f"{attention}.q_up_nope.weight"].shape[0] // n_heads
    return config | {
        "kv_lora_rank": state[f"{attention}.kv_norm.weight"].shape[0],
        "q_lora_rank": state[f"{attention}.q_norm.weight"].shape[0],
        "qk_rope_head_dim": rope_dim,
        "qk_nope_head_dim": nope_dim,
        "v_head_dim": state[f"{attention}.wo.weight"].shape[1] // n_heads,
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.fullmatch(pattern, name))})
