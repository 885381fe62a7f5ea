"""Nano-OSRT v3 and v4 (spec page osrt): layers run in loops, a residual adapter per loop and layer, v4 with experts."""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat, model_validator
from torch import Tensor

from looplm.config import parse
from looplm.errors import CheckpointError
from looplm.hf.original import Count, CountOrNone, OriginalConfig, Size
from looplm.hf.rules import Rule, same, scalar, stacked
from looplm.model.attention import GQAConfig
from looplm.model.block import AdapterConfig, BlockConfig
from looplm.model.ffn import FFNConfig, ParallelConfig, SwiGLUConfig
from looplm.model.linear import FullConfig, HRAConfig
from looplm.model.looped import ModelConfig
from looplm.model.moe import MoEConfig
from looplm.model.rope import RopeConfig

FLOAT32_EPS = 2.0**-23
V4_ROOT = "model."  # what every name of v4 begins with


class OSRTConfig(OriginalConfig):
    """What the configs of v3 and v4 have in common, their defaults and names."""

    head_dim: Size = 64
    """Width of a head."""
    recursive_loops: Count = 6
    """Loops."""
    adapter_rank: Size = 16
    """Rank of the adapters."""
    adapter_alpha: PositiveFloat = 16.0
    """Times the rank, their factor."""
    hra_enabled: bool = True
    """Whether the linear maps have the low-rank product of fine-tuning."""
    hra_rank: CountOrNone = 0
    """Its rank, 0 for none."""
    hra_scale: PositiveFloat = 1.0
    """Its factor."""
    rope_theta: PositiveFloat = 10000.0
    """Base wavelength."""

    @property
    def unused(self) -> frozenset[str]:
        return frozenset({"hra_enabled"} if self.hra_rank else {"hra_enabled", "hra_scale"})


class V3Config(OSRTConfig):
    """Nano-OSRT v3's config."""

    shapeless = frozenset({"adapter_alpha", "hra_scale", "rope_theta", "real_vocab_size", "seq_len"})
    dim: Size = 1280
    """Width of the stream."""
    heads: Count = 20
    """Heads."""
    vocab_size: Size = 50304
    """Tokens, padded to a multiple of 64."""
    real_vocab_size: Size = 50277
    """Tokens that are scored and sampled; all, if it is more than there are."""
    seq_len: Size = 4096
    """Longest context."""
    num_blocks: Count = 2
    """Layers in the loop."""
    ffn_hidden: Size
    """Inner width; no field of theirs, but follows from dim."""

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, fields: dict[str, Any]) -> dict[str, Any]:
        dim = fields.get("dim", 1280)
        return {"ffn_hidden": 64 * math.ceil(int(dim * 8 / 3) / 64)} | fields if type(dim) is int else fields

    @property
    def context(self) -> int:
        """Longest context."""
        return self.seq_len

    @property
    def ffn(self) -> FFNConfig:
        """Channel mixing."""
        return SwiGLUConfig(d_ff=self.ffn_hidden)


class V4Config(OSRTConfig):
    """Nano-OSRT v4's config."""

    shapeless = frozenset(
        {
            *("adapter_alpha", "hra_scale", "rope_theta", "real_vocab_size", "max_position_embeddings"),
            *("top_k_experts", "router_aux_loss_coeff", "router_z_loss_coeff"),
        }
    )
    dim: Size = 1536
    """Width of the stream."""
    heads: Count = 24
    """Heads."""
    vocab_size: Size = 65536
    """Tokens."""
    real_vocab_size: Size = 65536
    """Tokens that are scored and sampled; all, if it is more than there are."""
    max_position_embeddings: Size = 8192
    """Longest context."""
    num_blocks: Count = 3
    """Layers in the loop."""
    dense_hidden: Size = 4096
    """Inner width of the dense branch."""
    num_routed_experts: Count = 11
    """Experts to choose from. One more is shared by all tokens."""
    top_k_experts: Count = 2
    """Experts a token chooses."""
    expert_hidden: Size = 1024
    """Inner width of an expert."""
    router_aux_loss_coeff: NonNegativeFloat = 0.01
    """Weight of the balance loss."""
    router_z_loss_coeff: NonNegativeFloat = 0.001
    """Weight of the z-loss."""

    @property
    def context(self) -> int:
        """Longest context."""
        return self.max_position_embeddings

    @property
    def ffn(self) -> FFNConfig:
        """Channel mixing."""
        return ParallelConfig(
            d_ff=self.dense_hidden,
            moe=MoEConfig(
                n_experts=self.num_routed_experts,
                d_ff=self.expert_hidden,
                top_k=self.top_k_experts,
                n_shared=1,
                gate="sigmoid",
                renormalise=False,
                n_loop_embeds=self.recursive_loops,
                balance_loss=self.router_aux_loss_coeff,
                z_loss=self.router_z_loss_coeff,
            ),
        )


def original_config(fields: Mapping[str, Any], state: Mapping[str, Tensor]) -> V3Config | V4Config:
    """Nano-OSRT's own config. `fields` may leave some out; the weights tell v4 from v3, and the rank of HRA."""
    is_v4 = any(name.startswith(V4_ROOT) for name in state)
    fields = {"hra_rank": _hra_rank(state)} | dict(fields)
    if is_v4:
        v4: V4Config = parse(V4Config, fields, source="the osrt v4 config")
        return v4
    v3: V3Config = parse(V3Config, fields, source="the osrt v3 config")
    return v3


def model_config(original: V3Config | V4Config) -> ModelConfig:
    """Our config for one of Nano-OSRT's."""
    n_loops, hra_rank = original.recursive_loops, original.hra_rank if original.hra_enabled else 0
    return ModelConfig(
        vocab_size=original.vocab_size,
        used_vocab=min(original.real_vocab_size, original.vocab_size),
        d_model=original.dim,
        seq_len=original.context,
        n_core=original.num_blocks,
        n_loops=n_loops,
        block=BlockConfig(
            attention=GQAConfig(
                n_heads=original.heads,
                n_kv_heads=original.heads,
                head_dim=original.head_dim,
                fused_qkv=True,
                rope=RopeConfig(base=original.rope_theta),
            ),
            ffn=original.ffn,
            linear=HRAConfig(rank=hra_rank, scale=original.hra_scale) if hra_rank else FullConfig(),
            norm_eps=FLOAT32_EPS,
        ),
        adapter=AdapterConfig(
            rank=original.adapter_rank, scale=original.adapter_alpha / original.adapter_rank, n_loops=n_loops
        ),
        loop_norm=True,
        init="normal",
        init_std=0.02,
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Which tensor is which."""
    is_v4, n_core = isinstance(config.block.ffn, ParallelConfig), config.n_core
    root = "model." if is_v4 else ""
    table = [
        same("embed.weight", f"{root}embedding.weight"),
        same("loop_norm.weight", f"{root}norm_loop.weight"),
        same("norm.weight", f"{root}norm_out.weight"),
    ]
    for layer in range(n_core):
        ours, theirs = f"core.{layer}", f"{root}blocks.{layer}"
        for part in "ab":
            names = [f"{root}adapters_{part}.{loop_idx * n_core + layer}" for loop_idx in range(config.n_loops)]
            table += [stacked(f"{ours}.entry.0.{part}", names)]
        table += [
            same(f"{ours}.attention_norm.weight", f"{theirs}.norm_attn.weight"),
            *_linear(config, f"{ours}.attention.qkv", f"{theirs}.qkv"),
            *_linear(config, f"{ours}.attention.o", f"{theirs}.out_proj"),
        ]
        if is_v4:
            table += _v4_rules(config, f"{ours}.ffn", theirs)
        else:
            table += [same(f"{ours}.ffn_norm.weight", f"{theirs}.norm_ffn.weight")]
            table += _swiglu(config, f"{ours}.ffn", f"{theirs}.ffn")
    return table


def _v4_rules(config: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    ffn = config.block.ffn
    assert isinstance(ffn, ParallelConfig)
    table = [
        scalar(f"{ours}.dense_gate", f"{theirs}.dense_gate"),
        scalar(f"{ours}.moe_gate", f"{theirs}.moe_gate"),
        same(f"{ours}.dense_norm.weight", f"{theirs}.norm_dense.weight"),
        same(f"{ours}.moe_norm.weight", f"{theirs}.norm_moe.weight"),
        same(f"{ours}.moe.router.weight", f"{theirs}.moe.router.weight"),
        same(f"{ours}.moe.loop_embed.weight", f"{theirs}.moe.loop_embeddings.weight"),
        *_swiglu(config, f"{ours}.dense", f"{theirs}.ffn_dense"),
        *_swiglu(config, f"{ours}.moe.shared.0", f"{theirs}.moe.shared_expert"),
    ]
    for part in ("gate", "up", "down"):
        names = [f"{theirs}.moe.experts.{index}.w_{part}" for index in range(ffn.moe.n_experts)]
        if isinstance(config.block.linear, HRAConfig):
            base = [f"{name}.original.weight" for name in names]
            table += [
                stacked(f"{ours}.moe.{part}.{side}", [f"{name}.adapter_{side}" for name in names]) for side in "ab"
            ]
        else:
            base = [f"{name}.weight" for name in names]
        table += [stacked(f"{ours}.moe.{part}.weight", base, transposed=True)]
    return table


def _swiglu(config: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    parts = ("gate", "up", "down")
    return [rule for part in parts for rule in _linear(config, f"{ours}.{part}", f"{theirs}.w_{part}")]


def _linear(config: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    if not isinstance(config.block.linear, HRAConfig):
        return [same(f"{ours}.weight", f"{theirs}.weight")]
    return [
        same(f"{ours}.base.weight", f"{theirs}.original.weight"),
        same(f"{ours}.a", f"{theirs}.adapter_a"),
        same(f"{ours}.b", f"{theirs}.adapter_b"),
    ]


def clean(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """As it is."""
    return dict(state)


V3_VOCAB, V3_USED_VOCAB = 50304, 50277  # the GPT-2 style tokenizer of the seed, padded to a multiple of 64


def config_of_shapes(state: Mapping[str, Tensor], *, head_dim: int = 64) -> dict[str, Any]:
    """What the shapes of a checkpoint tell of its config: the files themselves carry none. Every release had heads of
    64."""
    is_v4 = any(name.startswith(V4_ROOT) for name in state)
    root = V4_ROOT if is_v4 else ""
    if f"{root}embedding.weight" not in state or f"{root}adapters_a.0" not in state:
        raise CheckpointError("no Nano-OSRT weights: embedding.weight or adapters_a.0 missing; name the right system")
    vocab_size, d_model = state[f"{root}embedding.weight"].shape
    n_blocks = sum(name.endswith("norm_attn.weight") for name in state)
    hra_rank = _hra_rank(state)
    weight = "original.weight" if hra_rank else "weight"
    config: dict[str, Any] = {
        "dim": d_model,
        "heads": d_model // head_dim,
        "head_dim": head_dim,
        "vocab_size": vocab_size,
        "real_vocab_size": V3_USED_VOCAB if vocab_size == V3_VOCAB else vocab_size,
        "num_blocks": n_blocks,
        "recursive_loops": sum(name.startswith(f"{root}adapters_a.") for name in state) // n_blocks,
        "adapter_rank": state[f"{root}adapters_a.0"].shape[1],
        "hra_rank": hra_rank,
    }
    if not is_v4:
        return config | {"ffn_hidden": state[f"blocks.0.ffn.w_gate.{weight}"].shape[0]}
    moe = f"{root}blocks.0.moe"
    n_routed = sum(name.startswith(f"{moe}.experts.") and name.endswith(f"w_gate.{weight}") for name in state)
    return config | {
        "dense_hidden": state[f"{root}blocks.0.ffn_dense.w_gate.{weight}"].shape[0],
        "num_experts": n_routed + 1,
        "num_routed_experts": n_routed,
        "expert_hidden": state[f"{moe}.experts.0.w_gate.{weight}"].shape[0],
    }


def _hra_rank(state: Mapping[str, Tensor]) -> int:
    """Rank of the low-rank products beside the linear maps, 0 where there are none."""
    found = [tensor for name, tensor in state.items() if name.endswith("qkv.adapter_a")]
    return found[0].shape[1] if found else 0
