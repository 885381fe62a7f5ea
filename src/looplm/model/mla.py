"""Multi-head latent attention (DeepSeek-V2, 2024): keys and values of all heads from one small latent per token.

The cache holds the normalised latent and one turned key that all heads share: kv_rank + rope_dim numbers per token, as
many as attention needs to be exact. OpenMythos caches that key once per head.
Decoding does not expand the cached latents to keys and values again at every token: the up projection is applied to the
query and to the result instead (DeepSeek-V2, 2.1.2, "absorbed"), the same product in another order.
Shapes: B batch, T tokens, S keys, H heads, N unturned width, P turned width, V value width, R latent width.
"""

from typing import Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from looplm.config import Config, Size
from looplm.model.attention import attend
from looplm.model.cache import Slot
from looplm.model.layer_inputs import LayerInputs, Mask, Place
from looplm.model.linear import LinearConfig, join_weights, make_linear, together
from looplm.model.norm import RMSNorm
from looplm.model.rope import RopeConfig, apply_rope, check_turning


class MLAConfig(Config):
    """Latent attention: every head has unturned channels from the latents and turned ones, the keys' ones shared."""

    kind: Literal["mla"] = "mla"
    n_heads: Size
    """Heads."""
    q_rank: Size
    """Width of the queries' latent."""
    kv_rank: Size
    """Width of the latent of keys and values: what the cache keeps."""
    nope_dim: Size
    """Unturned channels of a head."""
    rope_dim: Size
    """Turned channels of a head, even."""
    v_dim: Size
    """Value channels of a head."""
    rope: RopeConfig = RopeConfig()
    """Positions."""

    @model_validator(mode="after")
    def _even(self) -> "MLAConfig":
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim {self.rope_dim} is odd; RoPE needs an even width")
        check_turning(self.rope, self.rope_dim, name="rope_dim")
        return self

    @property
    def window(self) -> None:
        """Latent attention sees all tokens."""
        return None

    @property
    def slot_shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """(heads, width) of the two tensors a cache slot keeps per token."""
        return (1, self.kv_rank), (1, self.rope_dim)

    @property
    def score_width(self) -> int:
        """Multiply-adds per query and key for scores and values, all heads."""
        return self.n_heads * (self.nope_dim + self.rope_dim + self.v_dim)

    def window_at(self, layer_idx: int, n_layers: int) -> None:
        """Every layer sees all tokens."""
        return None


class MLA(nn.Module):
    """(B, T, D) to (B, T, D); with a slot, the latent and the shared key are stored and read there."""

    def __init__(
        self, d_model: int, config: MLAConfig, linear: LinearConfig, *, norm_eps: float, norm_weight: bool, place: Place
    ) -> None:
        super().__init__()
        self.config = config
        n_heads = config.n_heads
        self.q_down = make_linear(linear, d_model, config.q_rank)
        self.q_norm = RMSNorm(config.q_rank, eps=norm_eps, has_weight=norm_weight)
        self.q_up_nope = make_linear(linear, config.q_rank, n_heads * config.nope_dim)
        self.q_up_rope = make_linear(linear, config.q_rank, n_heads * config.rope_dim)
        self.kv_down = make_linear(linear, d_model, config.kv_rank + config.rope_dim)
        self.kv_norm = RMSNorm(config.kv_rank, eps=norm_eps, has_weight=norm_weight)
        self.kv_up = make_linear(linear, config.kv_rank, n_heads * (config.nope_dim + config.v_dim))
        self.o = make_linear(linear, n_heads * config.v_dim, d_model)

    def forward(self, x: Tensor, inputs: LayerInputs, slot: Slot | None = None) -> Tensor:
        config, pairing = self.config, self.config.rope.pairing
        latent_q, down = together(x, self.q_down, self.kv_down)
        q_nope, q_rope = together(self.q_norm(latent_q), self.q_up_nope, self.q_up_rope)
        q_nope = self._heads(q_nope)
        q_rope = apply_rope(self._heads(q_rope), inputs.cos, inputs.sin, pairing=pairing)
        latent, key = down.split((config.kv_rank, config.rope_dim), dim=-1)
        latent = self.kv_norm(latent)[:, None]  # (B, 1, T, R)
        key = apply_rope(key[:, None], inputs.cos, inputs.sin, pairing=pairing)  # (B, 1, T, P)
        if slot is not None:
            assert inputs.positions is not None
            slot.write(latent, key, inputs.positions)
            latent, key = (kept.to(x.dtype) for kept in slot.read(inputs.n_keys))
            if self._absorbs(n_tokens=x.shape[1], n_keys=latent.shape[2]):
                return self.o(self._absorbed(q_nope, q_rope, latent[:, 0], key[:, 0], inputs.masks[None]))
        q = torch.cat((q_nope, q_rope), dim=-1)  # (B, H, T, N + P)
        up = self._heads(self.kv_up(latent[:, 0]))  # (B, H, S, N + V)
        k_nope, v = up.split((config.nope_dim, config.v_dim), dim=-1)
        k = torch.cat((k_nope, key.expand(-1, config.n_heads, -1, -1)), dim=-1)
        mixed = attend(q, k, v, inputs.masks[None])
        return self.o(mixed.transpose(1, 2).flatten(2))

    def lay_out(self) -> None:
        """Two products for all projections of a token but the last one."""
        join_weights(self.q_down, self.kv_down)
        join_weights(self.q_up_nope, self.q_up_rope)
        join_weights(self.o)

    def _absorbs(self, *, n_tokens: int, n_keys: int) -> bool:
        """Whether the absorbed order takes fewer multiply-adds; it needs the up projection as one matrix."""
        config = self.config
        width = config.nope_dim + config.v_dim
        expanded = n_keys * config.kv_rank * width + n_tokens * n_keys * (width + config.rope_dim)
        absorbed = n_tokens * config.kv_rank * width + n_tokens * n_keys * (2 * config.kv_rank + config.rope_dim)
        return isinstance(self.kv_up, nn.Linear) and absorbed < expanded

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, key: Tensor, mask: Mask) -> Tensor:
        """(B, T, H * V) for queries (B, H, T, N) and (B, H, T, P), latents (B, S, R) and shared keys (B, S, P)."""
        config, n_tokens = self.config, q_nope.shape[2]
        assert isinstance(self.kv_up, nn.Linear)
        assert mask.seen is not None
        up = self.kv_up.weight.to(q_nope.dtype).view(config.n_heads, -1, config.kv_rank)
        up_key, up_value = up.split((config.nope_dim, config.v_dim), dim=1)  # (H, N, R), (H, V, R)
        # heads first: with the batch first, matmul would copy the matrices for every row of the batch
        q_latent = q_nope.transpose(0, 1).flatten(1, 2) @ up_key  # (H, B * T, R)
        q_latent = q_latent.unflatten(1, (-1, n_tokens)).transpose(0, 1).flatten(1, 2)  # (B, H * T, R)
        scores = q_latent @ latent.mT + q_rope.flatten(1, 2) @ key.mT  # (B, H * T, S)
        scores = (
            scores.view(-1, config.n_heads, n_tokens, latent.shape[1]) * (config.nope_dim + config.rope_dim) ** -0.5
        )
        weights = scores.float().masked_fill(~mask.seen, -torch.inf).softmax(-1).to(latent.dtype)
        mixed = (weights.flatten(1, 2) @ latent).view(-1, config.n_heads, n_tokens, config.kv_rank)
        values = mixed.transpose(0, 1).flatten(1, 2) @ up_value.mT  # (H, B * T, V)
        return values.unflatten(1, (-1, n_tokens)).permute(1, 2, 0, 3).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.config.n_heads, -1)).transpose(1, 2)
