"""Grouped-query attention (Ainslie et al. 2023) with RoPE, optional QK-norm and an optional sliding window.

Shapes: B batch, T tokens, S keys, H query heads, K head width.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from looplm.config import Config
from looplm.model.cache import Slot
from looplm.model.linear import FullConfig, LowRankConfig, make_linear
from looplm.model.norm import RMSNorm
from looplm.model.rope import apply_rope, rope_tables


class GQAConfig(Config):
    """Grouped-query attention; n_kv_heads = n_heads is plain multi-head attention."""

    kind: Literal["gqa"] = "gqa"
    n_heads: PositiveInt
    """Query heads."""
    n_kv_heads: PositiveInt
    """Key/value heads; divides n_heads."""
    head_dim: PositiveInt
    """Width of one head, even (RoPE turns pairs of channels)."""
    qk_norm: bool = False
    """RMS-normalise queries and keys per head, before RoPE."""
    window: PositiveInt | None = None
    """Each token sees itself and the window - 1 tokens before it; null for all of them."""
    rope_base: PositiveFloat = 10000.0
    """RoPE base wavelength in tokens."""

    @model_validator(mode="after")
    def _heads_fit(self) -> "GQAConfig":
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; RoPE needs an even width")
        return self


# Up to this length a CPU trains faster with the scores written out than with the flash kernel, whose backward is slow
# there (docs/log.md, 2026-11-21). The mask is added, not filled in: compiled, a fill takes three times as long.
MAX_WRITTEN_OUT = 512


@dataclass
class AttentionInputs:
    """What every attention layer of one forward shares: computed once, used by all layers in all loops."""

    cos: Tensor  # (1 or B, 1, T, K/2)
    sin: Tensor
    mask: Tensor | None  # (1 or B, 1, T, S), True where a key is seen; None means plain causal over T
    bias: Tensor | None = None  # (1 or B, 1, T, S), 0 where a key is seen, -1e30 elsewhere: scores are written out
    positions: Tensor | None = None  # (B, T), with a cache only
    n_keys: int | None = None  # keys of the cache that any row can see, with a cache only


def attention_inputs(
    config: GQAConfig,
    *,
    n_tokens: int,
    device: torch.device,
    positions: Tensor | None = None,
    n_keys: int | None = None,
    documents: Tensor | None = None,
) -> AttentionInputs:
    """Tables and mask for a full forward (positions None) or for tokens at `positions` (B, T) of a cache.

    `documents` (B, T), full forward only, numbers the documents packed in a row: a token sees its own document only.
    """
    at = torch.arange(n_tokens, device=device) if positions is None else positions
    cos, sin = rope_tables(at, head_dim=config.head_dim, base=config.rope_base)
    writes_out = torch.is_grad_enabled() and positions is None and device.type == "cpu" and n_tokens <= MAX_WRITTEN_OUT
    if positions is None and config.window is None and documents is None and not writes_out:
        return AttentionInputs(cos, sin, None)
    key_at = torch.arange(n_tokens if n_keys is None else n_keys, device=device)
    query_at = at if at.dim() == 2 else at[None]
    distance = query_at[:, :, None] - key_at[None, None, :]  # (B, T, S)
    seen = distance >= 0
    if config.window is not None:
        seen = seen & (distance < config.window)
    if documents is not None:
        seen = seen & (documents[:, :, None] == documents[:, None, :])
    mask = seen[:, None]
    bias = torch.where(mask, 0.0, -1e30).bfloat16() if writes_out else None
    return AttentionInputs(cos, sin, mask, bias, positions, n_keys)


class GQA(nn.Module):
    """(B, T, D) to (B, T, D); with a slot, keys and values are stored and read there."""

    def __init__(self, d_model: int, config: GQAConfig, linear: FullConfig | LowRankConfig, *, norm_eps: float) -> None:
        super().__init__()
        self.config = config
        d_query, d_key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q = make_linear(linear, d_model, d_query)
        self.k = make_linear(linear, d_model, d_key)
        self.v = make_linear(linear, d_model, d_key)
        self.o = make_linear(linear, d_query, d_model)
        self.q_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, eps=norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, inputs: AttentionInputs, slot: Slot | None = None) -> Tensor:
        q = apply_rope(self.q_norm(self._heads(self.q(x))), inputs.cos, inputs.sin)  # (B, H, T, K)
        k = apply_rope(self.k_norm(self._heads(self.k(x))), inputs.cos, inputs.sin)  # (B, H_kv, T, K)
        v = self._heads(self.v(x))
        if slot is not None:
            assert inputs.positions is not None
            slot.write(k, v, inputs.positions)
            k, v = slot.keys[:, :, : inputs.n_keys].to(q.dtype), slot.values[:, :, : inputs.n_keys].to(q.dtype)
        n_groups = self.config.n_heads // self.config.n_kv_heads
        if n_groups > 1:
            k, v = k.repeat_interleave(n_groups, dim=1), v.repeat_interleave(n_groups, dim=1)
        mixed = attend(q, k, v, inputs)
        return self.o(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)  # (B, H, T, K)


def attend(q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over (B, H, T, K)."""
    if inputs.bias is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=inputs.mask, is_causal=inputs.mask is None)
    mixed: Tensor = _WrittenOut.apply(q, k, v, inputs.bias)
    return mixed


class _WrittenOut(torch.autograd.Function):
    """Attention by its scores, with the backward written out too: the gradient of k comes out in k's own layout (torch
    2.13's compiled CPU kernels read NaN where they are handed its transpose), and only the weights are kept for it."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias
        weights = scores.softmax(-1).to(v.dtype)  # (B, H, T, S)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        grad_weights = grad @ v.transpose(-1, -2)
        mean = (weights * grad_weights).sum(-1, keepdim=True)
        grad_scores = weights * (grad_weights - mean) * q.shape[-1] ** -0.5
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ grad, None
