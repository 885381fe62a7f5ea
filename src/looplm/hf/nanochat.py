"""nanochat (spec page nanochat): a plain GPT; its rotation by -angle becomes ours by swapping the halves of q and k."""

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field, model_validator
from torch import Tensor

from looplm.config import parse
from looplm.hf.original import Count, OriginalConfig, Size
from looplm.hf.rules import Rule, halves_swapped, same, split
from looplm.model.attention import GQAConfig, ValueEmbedConfig
from looplm.model.block import BlockConfig
from looplm.model.ffn import ReLU2Config
from looplm.model.looped import ModelConfig
from looplm.model.rope import RopeConfig
from looplm.model.smear import GateSmearConfig

FLOAT32_EPS = 2.0**-23


class NanochatConfig(OriginalConfig):
    """nanochat's GPTConfig, its defaults and names."""

    shapeless = frozenset({"sequence_len", "window_pattern"})
    sequence_len: Size = 2048
    """Tokens of a training row; positions and windows follow from it."""
    vocab_size: Size = 32768
    """Tokens, without padding."""
    n_layer: Count = 12
    """Layers."""
    n_head: Count = 6
    """Query heads."""
    n_kv_head: Count = 6
    """Key and value heads."""
    n_embd: Size = 768
    """Width of the stream."""
    window_pattern: str = Field(default="L", pattern="^[SLsl]+$")
    """A letter a layer, repeated: S for a quarter of the context, L for all. What has none is older than windows."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "NanochatConfig":
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}")
        return self


def original_config(fields: Mapping[str, Any], state: Mapping[str, Tensor]) -> NanochatConfig:
    """nanochat's own config. `fields` may leave some out; the weights add none."""
    return parse(NanochatConfig, fields, source="the nanochat config")


def model_config(original: NanochatConfig) -> ModelConfig:
    """Our config for one of nanochat's."""
    n_layers, d_model, n_heads = original.n_layer, original.n_embd, original.n_head
    letters = (original.window_pattern.upper() * n_layers)[: n_layers - 1] + "L"
    # nanochat's short window counts the tokens before the query, ours the query too
    short = math.ceil(math.ceil(original.sequence_len / 4) / 128) * 128 + 1
    has_short = "S" in letters
    return ModelConfig(
        vocab_size=original.vocab_size,
        vocab_multiple=64,
        d_model=d_model,
        seq_len=original.sequence_len,
        n_core=n_layers,
        n_loops=1,
        block=BlockConfig(
            attention=GQAConfig(
                n_heads=n_heads,
                n_kv_heads=original.n_kv_head,
                head_dim=d_model // n_heads,
                qk_norm="after_rope",
                qk_gain=1.2,
                window=short if has_short else None,
                window_pattern=letters if has_short else "S",
                value_embed=ValueEmbedConfig(n_channels=12, scale=3.0),
                rope=RopeConfig(base=100000.0),
            ),
            ffn=ReLU2Config(d_ff=4 * d_model),
            norm_eps=FLOAT32_EPS,
            norm_weight=False,
            stream_scales=True,
        ),
        smear=GateSmearConfig(n_channels=24),
        embed_norm=True,
        backout=True,
        softcap=15.0,
        tied_head=False,
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Which tensor is which."""
    attention = config.block.attention
    assert isinstance(attention, GQAConfig)
    table = [
        same("embed.weight", "transformer.wte.weight"),
        same("head.weight", "lm_head.weight"),
        same("smear.gate.weight", "smear_gate.weight"),
        same("smear.scale", "smear_lambda"),
        same("backout", "backout_lambda"),
        split([f"core.{layer}.entry.0.stream" for layer in range(config.n_core)], "resid_lambdas"),
        split([f"core.{layer}.entry.0.first" for layer in range(config.n_core)], "x0_lambdas"),
    ]
    for layer in range(config.n_core):
        ours, theirs = f"core.{layer}", f"transformer.h.{layer}"
        table += [
            halves_swapped(f"{ours}.attention.q.weight", f"{theirs}.attn.c_q.weight", head_dim=attention.head_dim),
            halves_swapped(f"{ours}.attention.k.weight", f"{theirs}.attn.c_k.weight", head_dim=attention.head_dim),
            same(f"{ours}.attention.v.weight", f"{theirs}.attn.c_v.weight"),
            same(f"{ours}.attention.o.weight", f"{theirs}.attn.c_proj.weight"),
            same(f"{ours}.ffn.up.weight", f"{theirs}.mlp.c_fc.weight"),
            same(f"{ours}.ffn.down.weight", f"{theirs}.mlp.c_proj.weight"),
        ]
        if layer % 2 == (config.n_core - 1) % 2:
            table += [
                same(f"{ours}.attention.value_embed.gate.weight", f"{theirs}.attn.ve_gate.weight"),
                same(f"{ours}.attention.value_embed.table.weight", f"value_embeds.{layer}.weight"),
            ]
    return table


def clean(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """What any version of nanochat wrote, as the newest writes it: all lambdas there."""
    like = next(iter(state.values())).float()
    filled = {"resid_lambdas": like.new_ones(config.n_core), "x0_lambdas": like.new_zeros(config.n_core)}
    return filled | dict(state)
