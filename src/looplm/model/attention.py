"""Grouped-query attention (Ainslie et al. 2023) with RoPE, optional QK-norm, windows and value embeddings.

Shapes: B batch, T tokens, S keys, H query heads, K head width.
"""

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from looplm.config import Config, Scale, Size
from looplm.model.cache import Slot
from looplm.model.layer_inputs import LayerInputs, Mask, Place
from looplm.model.linear import LinearConfig, join_weights, make_linear, together
from looplm.model.norm import RMSNorm
from looplm.model.rope import RopeConfig, apply_rope, check_turning

BLOCK = 128  # queries of a block, where scores are written out in blocks


class ValueEmbedConfig(Config):
    """A table of values by token id, mixed into the values of every second layer, the last one always (nanochat)."""

    n_channels: Size = 12
    """Channels of the layer's input that the gate reads."""
    scale: Scale = 3.0
    """Largest share of a table row that is added."""


class GQAConfig(Config):
    """Grouped-query attention; n_kv_heads = n_heads is plain multi-head attention."""

    kind: Literal["gqa"] = "gqa"
    n_heads: Size
    """Query heads."""
    n_kv_heads: Size
    """Key/value heads; divides n_heads."""
    head_dim: Size
    """Width of one head, even (RoPE turns pairs of channels)."""
    fused_qkv: bool = False
    """Store the three projections as one matrix."""
    qk_norm: Literal["none", "before_rope", "after_rope"] = "none"
    """RMS-normalise queries and keys per head."""
    qk_gain: Scale = 1.0
    """Queries and keys are multiplied by this after the norm."""
    window: Size | None = None
    """Tokens a windowed layer sees, itself included; null for all of them."""
    window_pattern: str = Field(default="S", pattern="^[SL]+$")
    """S for a windowed layer, L for one that sees all tokens; repeated over the layers, the last layer L if any is."""
    value_embed: ValueEmbedConfig | None = None
    """Values by token id; null for none."""
    rope: RopeConfig = RopeConfig()
    """Positions."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "GQAConfig":
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE needs an even width")
        check_turning(self.rope, self.head_dim, name="head_dim")
        if "L" in self.window_pattern and self.window is None:
            raise ValueError(f"window_pattern {self.window_pattern!r} needs a window")
        return self

    @property
    def rope_dim(self) -> int:
        """Channels that turn."""
        return self.head_dim

    @property
    def slot_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, width) of the two tensors a cache slot keeps per token."""
        return (self.n_kv_heads, self.head_dim), (self.n_kv_heads, self.head_dim)

    @property
    def score_width(self) -> int:
        """Multiply-adds per query and key for scores and values, all heads."""
        return 2 * self.n_heads * self.head_dim

    def window_at(self, layer_idx: int, n_layers: int) -> int | None:
        """The window of one layer."""
        # if any layer sees everything, the last one does, wherever the pattern ends
        is_last = layer_idx == n_layers - 1
        letter = self.window_pattern[layer_idx % len(self.window_pattern)]
        return None if letter == "L" or (is_last and "L" in self.window_pattern) else self.window


class ValueEmbed(nn.Module):
    """scale * sigmoid(gate(x[:n_channels])) per head times a table row per token, (B, H_kv, T, K)."""

    def __init__(self, config: ValueEmbedConfig, *, n_heads: int, head_dim: int, n_embeddings: int) -> None:
        super().__init__()
        self.config = config
        self.head_dim = head_dim
        self.table = nn.Embedding(n_embeddings, n_heads * head_dim)
        self.gate = nn.Linear(config.n_channels, n_heads, bias=False)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        # the gate reads a few channels only: its cost is next to nothing beside the table
        gate = self.config.scale * self.gate(x[..., : self.config.n_channels]).sigmoid()  # (B, T, H_kv)
        rows = self.table(ids).to(x.dtype).unflatten(-1, (-1, self.head_dim))  # (B, T, H_kv, K)
        return (gate[..., None] * rows).transpose(1, 2)


class GQA(nn.Module):
    """(B, T, D) to (B, T, D); with a slot, keys and values are stored and read there."""

    def __init__(
        self, d_model: int, config: GQAConfig, linear: LinearConfig, *, norm_eps: float, norm_weight: bool, place: Place
    ) -> None:
        super().__init__()
        self.config = config
        self.window = config.window_at(place.layer_idx, place.n_layers)
        self.widths = [n * config.head_dim for n in (config.n_heads, config.n_kv_heads, config.n_kv_heads)]
        # stored as one matrix (Nano-OSRT), or as three, which `lay_out` puts side by side for decoding
        if config.fused_qkv:
            self.qkv = make_linear(linear, d_model, sum(self.widths))
        else:
            self.q, self.k, self.v = (make_linear(linear, d_model, width) for width in self.widths)
        self.o = make_linear(linear, self.widths[0], d_model)

        def head_norm() -> nn.Module:
            if config.qk_norm == "none":
                return nn.Identity()
            return RMSNorm(config.head_dim, eps=norm_eps, has_weight=norm_weight)

        self.q_norm, self.k_norm = head_norm(), head_norm()
        # every second layer, counted back from the last one (nanochat)
        has_values = config.value_embed is not None and place.layer_idx % 2 == (place.n_layers - 1) % 2
        self.value_embed = None
        if has_values:
            assert config.value_embed is not None
            self.value_embed = ValueEmbed(
                config.value_embed,
                n_heads=config.n_kv_heads,
                head_dim=config.head_dim,
                n_embeddings=place.n_embeddings,
            )

    def forward(self, x: Tensor, inputs: LayerInputs, slot: Slot | None = None) -> Tensor:
        # (B, T, H K) each, with fewer heads for keys and values
        fused = self.config.fused_qkv
        q, k, v = self.qkv(x).split(self.widths, dim=-1) if fused else together(x, self.q, self.k, self.v)
        q, k = self._turned(q, self.q_norm, inputs), self._turned(k, self.k_norm, inputs)  # (B, H, T, K)
        v = self._heads(v)
        if self.value_embed is not None:
            v = v + self.value_embed(x, inputs.ids)
        if slot is not None:
            assert inputs.positions is not None
            # write the new tokens, then read every key that some row can see; the mask hides the others
            slot.write(k, v, inputs.positions)
            k, v = (kept.to(q.dtype) for kept in slot.read(inputs.n_keys))
        # each key/value head serves n_groups query heads: (B, H, S, K) after the repeat
        n_groups = self.config.n_heads // self.config.n_kv_heads
        if n_groups > 1:
            k, v = k.repeat_interleave(n_groups, dim=1), v.repeat_interleave(n_groups, dim=1)
        mixed = attend(q, k, v, inputs.masks[self.window])
        return self.o(mixed.transpose(1, 2).flatten(2))

    def lay_out(self) -> None:
        """One product for all projections of a token."""
        join_weights(self.qkv) if self.config.fused_qkv else join_weights(self.q, self.k, self.v)
        join_weights(self.o)

    def _turned(self, x: Tensor, norm: nn.Module, inputs: LayerInputs) -> Tensor:
        """Queries or keys by head, normalised and turned by their positions."""
        heads, pairing = self._heads(x), self.config.rope.pairing
        if self.config.qk_norm == "after_rope":
            heads = norm(apply_rope(heads, inputs.cos, inputs.sin, pairing=pairing))
        else:
            heads = apply_rope(norm(heads), inputs.cos, inputs.sin, pairing=pairing)
        return heads if self.config.qk_gain == 1 else heads * self.config.qk_gain

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (B, H, T, K)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float | None = None) -> Tensor:
    """softmax(q k^T * scale) v over (B, H, T, K); scale is 1 / sqrt(K) unless given."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # one new token, compiled: plain operations become loops over the keys that the compiler fuses (docs/log.md,
    # 2026-11-21); the fused kernel would be a call that it cannot look into
    if q.shape[2] == 1 and mask.seen is not None and torch.compiler.is_compiling() and not torch.is_grad_enabled():
        scores = (q @ k.transpose(-1, -2)).float() * scale
        return scores.masked_fill(~mask.seen, -torch.inf).softmax(-1).to(v.dtype) @ v
    if mask.bias is None:
        # without a mask tensor the kernel itself skips the keys that causality rules out
        is_causal = mask.seen is None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.seen, is_causal=is_causal, scale=scale)
    mixed: Tensor = _WrittenOut.apply(q, k, v, mask.bias, scale, mask.in_blocks)
    return mixed


class _WrittenOut(torch.autograd.Function):
    """Attention by its scores, with the backward written out too: the gradient of k comes out in k's own layout (torch
    2.13's compiled CPU kernels read NaN where they are handed its transpose), and only the weights are kept for it.

    With `in_blocks` the queries go in blocks, each with the keys up to its end: most of what causality rules out is not
    computed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, in_blocks: bool) -> Tensor:
        mixed, weights = [], []
        for own, seen in _blocks(q, in_blocks):
            # the mask is added, not filled in: compiled, a fill takes three times as long (docs/log.md, 2026-11-21)
            scores = q[:, :, own] @ k[:, :, seen].transpose(-1, -2) * scale + bias[:, :, own, seen]
            weights.append(scores.softmax(-1).to(v.dtype))  # (B, H, block, keys)
            mixed.append(weights[-1] @ v[:, :, seen])
        # the weights in v's type, not the scores: half the memory in bf16, and all that the backward pass needs
        ctx.save_for_backward(q, k, v, *weights)
        ctx.scale, ctx.in_blocks = scale, in_blocks
        return torch.cat(mixed, dim=2) if len(mixed) > 1 else mixed[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, *kept = ctx.saved_tensors
        grad_q, grad_k, grad_v = [], [], []
        for (own, seen), weights in zip(_blocks(q, ctx.in_blocks), kept, strict=True):
            part = grad[:, :, own]
            grad_weights = part @ v[:, :, seen].transpose(-1, -2)
            # the gradient of a softmax: w * (g - sum of w g over the keys)
            mean = (weights * grad_weights).sum(-1, keepdim=True)
            grad_scores = weights * (grad_weights - mean) * ctx.scale
            grad_q.append(grad_scores @ k[:, :, seen])
            # dS^T q, in k's own layout, not the transpose of q^T dS (see the class)
            grad_k.append(grad_scores.transpose(-1, -2) @ q[:, :, own])
            grad_v.append(weights.transpose(-1, -2) @ part)
        if len(kept) == 1:
            return grad_q[0], grad_k[0], grad_v[0], None, None, None
        # queries lie in one block each; a key is seen by all blocks from its own on, so its gradients add up
        return torch.cat(grad_q, dim=2), _sum_of_starts(grad_k), _sum_of_starts(grad_v), None, None, None


def _blocks(q: Tensor, in_blocks: bool) -> list[tuple[slice, slice]]:
    """Blocks of about BLOCK queries (B, H, T, K), or one of all, and the keys that each of them may see."""
    n_tokens = q.shape[2]
    # blocks of nearly equal size, rather than a short last one
    n_blocks = -(-n_tokens // BLOCK) if in_blocks else 1
    ends = [n_tokens * number // n_blocks for number in range(n_blocks + 1)]
    return [(slice(start, end), slice(end)) for start, end in pairwise(ends)]


def _sum_of_starts(parts: list[Tensor]) -> Tensor:
    """The sum of tensors (B, H, T, K), each with fewer tokens than the next, the shorter ones padded with zeros."""
    total = parts[-1]
    for part in parts[:-1]:
        total = total + F.pad(part, (0, 0, 0, total.shape[2] - part.shape[2]))
    return total
