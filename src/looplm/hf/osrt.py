"""Nano-OSRT v3 and v4 (spec page osrt): layers run in loops, a residual adapter per loop and layer, v4 with experts."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from looplm.errors import CheckpointError
from looplm.hf.rules import Rule, same, scalar, stacked
from looplm.model.attention import GQAConfig
from looplm.model.block import AdapterConfig, BlockConfig
from looplm.model.ffn import FFNConfig, ParallelConfig, SwiGLUConfig
from looplm.model.linear import FullConfig, HRAConfig
from looplm.model.looped import ModelConfig
from looplm.model.moe import MoEConfig
from looplm.model.rope import RopeConfig

FLOAT32_EPS = 2.0**-23


def model_config(foreign: Mapping[str, Any]) -> ModelConfig:
    """Our config for one with Nano-OSRT's field names; a v4 is told by its experts, HRA by a rank above 0."""
    n_loops, rank = foreign["recursive_loops"], foreign["adapter_rank"]
    is_v4 = "num_routed_experts" in foreign
    ffn: FFNConfig = SwiGLUConfig(d_ff=foreign["ffn_hidden"]) if not is_v4 else _v4_ffn(foreign, n_loops=n_loops)
    hra_rank = foreign.get("hra_rank", 0)
    return ModelConfig(
        vocab_size=foreign["vocab_size"],
        used_vocab=foreign["real_vocab_size"],
        d_model=foreign["dim"],
        seq_len=foreign["max_position_embeddings" if is_v4 else "seq_len"],
        n_core=foreign["num_blocks"],
        n_loops=n_loops,
        block=BlockConfig(
            attention=GQAConfig(
                n_heads=foreign["heads"],
                n_kv_heads=foreign["heads"],
                head_dim=foreign["head_dim"],
                fused_qkv=True,
                rope=RopeConfig(base=foreign["rope_theta"]),
            ),
            ffn=ffn,
            linear=HRAConfig(rank=hra_rank, scale=foreign.get("hra_scale", 1.0)) if hra_rank else FullConfig(),
            norm_eps=FLOAT32_EPS,
        ),
        adapter=AdapterConfig(rank=rank, scale=foreign["adapter_alpha"] / rank, n_loops=n_loops),
        loop_norm=True,
        init="normal",
        init_std=0.02,
    )


def _v4_ffn(foreign: Mapping[str, Any], *, n_loops: int) -> ParallelConfig:
    n_experts = foreign["num_routed_experts"]
    return ParallelConfig(
        d_ff=foreign["dense_hidden"],
        moe=MoEConfig(
            n_experts=n_experts,
            d_ff=foreign["expert_hidden"],
            top_k=foreign["top_k_experts"],
            n_shared=foreign["num_experts"] - n_experts,
            gate="sigmoid",
            renormalise=False,
            n_loop_embeds=n_loops,
            balance_loss=foreign["router_aux_loss_coeff"],
            z_loss=foreign["router_z_loss_coeff"],
        ),
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
HEAD_DIM, ADAPTER_ALPHA, TOP_K, ROPE_THETA = 64, 16.0, 2, 10000.0  # the same in every version, in no file
V3_SEQ_LEN, V4_SEQ_LEN = 4096, 8192


def config_of_shapes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The config of a checkpoint: their files carry none. What the shapes do not tell is what every release used."""
    is_v4 = "model.embedding.weight" in state
    root = "model." if is_v4 else ""
    if f"{root}embedding.weight" not in state or f"{root}adapters_a.0" not in state:
        raise CheckpointError("no Nano-OSRT weights: embedding.weight or adapters_a.0 missing; name the right system")
    vocab_size, d_model = state[f"{root}embedding.weight"].shape
    n_blocks = sum(name.endswith("norm_attn.weight") for name in state)
    has_hra = any(name.endswith("qkv.adapter_a") for name in state)
    weight = "original.weight" if has_hra else "weight"
    config: dict[str, Any] = {
        "dim": d_model,
        "heads": d_model // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "vocab_size": vocab_size,
        "real_vocab_size": V3_USED_VOCAB if vocab_size == V3_VOCAB else vocab_size,
        "num_blocks": n_blocks,
        "recursive_loops": sum(name.startswith(f"{root}adapters_a.") for name in state) // n_blocks,
        "adapter_rank": state[f"{root}adapters_a.0"].shape[1],
        "adapter_alpha": ADAPTER_ALPHA,
        "hra_rank": state[f"{root}blocks.0.qkv.adapter_a"].shape[1] if has_hra else 0,
        "hra_scale": 1.0,
        "rope_theta": ROPE_THETA,
    }
    if not is_v4:
        return config | {"ffn_hidden": state[f"blocks.0.ffn.w_gate.{weight}"].shape[0], "seq_len": V3_SEQ_LEN}
    moe = f"{root}blocks.0.moe"
    n_routed = sum(name.startswith(f"{moe}.experts.") and name.endswith(f"w_gate.{weight}") for name in state)
    return config | {
        "dense_hidden": state[f"{root}blocks.0.ffn_dense.w_gate.{weight}"].shape[0],
        "num_experts": n_routed + 1,
        "num_routed_experts": n_routed,
        "top_k_experts": TOP_K,
        "expert_hidden": state[f"{moe}.experts.0.w_gate.{weight}"].shape[0],
        "max_position_embeddings": V4_SEQ_LEN,
        "router_aux_loss_coeff": 0.01,
        "router_z_loss_coeff": 0.001,
    }
