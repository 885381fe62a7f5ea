"""Mixture of experts: a router sends every token to its top_k experts, each a SwiGLU; shared experts see all tokens.

Tokens are sorted by expert and every projection is one grouped product (`F.grouped_mm`) over all experts: a Python loop
over 64 experts takes 10 to 20 times as long. No token is ever dropped, so a token's output depends on no other token.
Shapes: B batch, T tokens, N tokens of the batch, E experts, k experts per token, D width.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from looplm.config import Config
from looplm.model.layer_inputs import LayerInputs
from looplm.model.linear import HRAConfig, LinearConfig, LowRankConfig
from looplm.model.swiglu import SwiGLU


class MoEConfig(Config):
    """Experts behind a linear router."""

    kind: Literal["moe"] = "moe"
    n_experts: PositiveInt
    """Experts to choose from."""
    d_ff: PositiveInt
    """Inner width of one."""
    top_k: PositiveInt
    """Experts per token."""
    n_shared: NonNegativeInt = 0
    """Experts that every token goes through, ungated."""
    shared_d_ff: PositiveInt | None = None
    """Inner width of a shared one; null for d_ff."""
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """What turns router logits into gates."""
    renormalise: bool = True
    """Divide the chosen gates by their sum."""
    n_loop_embeds: PositiveInt | None = None
    """Loops with a learned embedding that the router reads beside the token, later ones the last; null for none."""
    has_bias: bool = False
    """Keep a bias per expert that moves the choice, not the gate: a buffer, which gets no gradient."""
    balance_loss: NonNegativeFloat = 0.0
    """Weight of n_experts * sum(share of tokens * mean router probability), 1 when even (Switch)."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of mean(logsumexp(logits)^2)."""

    @model_validator(mode="after")
    def _possible(self) -> "MoEConfig":
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}")
        return self


class ExpertLinear(nn.Module):
    """One bias-free linear map per expert, (N, d_in) sorted by expert to (N, d_out); `ends` (E,) are running counts."""

    def __init__(self, n_experts: int, d_in: int, d_out: int, *, linear: LinearConfig) -> None:
        super().__init__()
        assert not isinstance(linear, LowRankConfig), "refused by BlockConfig"
        self.weight = nn.Parameter(torch.empty(n_experts, d_in, d_out))
        self.scale = linear.scale if isinstance(linear, HRAConfig) else 0.0
        if isinstance(linear, HRAConfig):
            self.a = nn.Parameter(torch.empty(n_experts, d_in, linear.rank))
            self.b = nn.Parameter(torch.empty(n_experts, linear.rank, d_out))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        y = grouped(x, self.weight, ends)
        return y + self.scale * grouped(grouped(x, self.a, ends), self.b, ends) if self.scale else y


class MoE(nn.Module):
    """(B, T, D) to (B, T, D)."""

    def __init__(self, d_model: int, config: MoEConfig, linear: LinearConfig) -> None:
        super().__init__()
        self.config = config
        self.router = nn.Linear(d_model * (2 if config.n_loop_embeds else 1), config.n_experts, bias=False)
        self.loop_embed = nn.Embedding(config.n_loop_embeds, d_model) if config.n_loop_embeds else None
        self.gate = ExpertLinear(config.n_experts, d_model, config.d_ff, linear=linear)
        self.up = ExpertLinear(config.n_experts, d_model, config.d_ff, linear=linear)
        self.down = ExpertLinear(config.n_experts, config.d_ff, d_model, linear=linear)
        shared_d_ff = config.shared_d_ff or config.d_ff
        self.shared = nn.ModuleList(SwiGLU(d_model, shared_d_ff, linear) for _ in range(config.n_shared))
        self.register_buffer("bias", torch.zeros(config.n_experts) if config.has_bias else None)
        self.bias: Tensor | None

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        flat = x.flatten(0, 1)  # (N, D)
        logits = self.route(flat, inputs.loop_idx)  # (N, E)
        chosen = (logits if self.bias is None else logits + self.bias).topk(self.config.top_k, dim=-1).indices  # (N, k)
        gates = (logits.softmax(-1) if self.config.gate == "softmax" else logits.sigmoid()).gather(1, chosen)
        if self.config.renormalise:
            gates = gates / gates.sum(-1, keepdim=True)
        if inputs.losses is not None:
            inputs.losses.append(self.loss(logits, chosen))
        mixed = self._experts(flat, chosen, gates.to(x.dtype))
        for expert in self.shared:
            mixed = mixed + expert(flat, inputs)
        return mixed.view(x.shape)

    def route(self, flat: Tensor, loop_idx: Tensor) -> Tensor:
        """Router logits (N, E) in fp32."""
        if self.loop_embed is not None:
            assert self.config.n_loop_embeds is not None
            embed = self.loop_embed(loop_idx.clamp(max=self.config.n_loop_embeds - 1))
            flat = torch.cat((flat, embed.to(flat.dtype).expand_as(flat)), dim=-1)
        return self.router(flat).float()

    def _experts(self, flat: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """Sum of the chosen experts' outputs times their gates, (N, D)."""
        order = chosen.flatten().argsort(stable=True)  # token-choices by expert
        token = order // self.config.top_k
        ends = self.load(chosen).cumsum(0).to(torch.int32)
        rows = flat[token]
        rows = self.down(F.silu(self.gate(rows, ends)) * self.up(rows, ends), ends)
        rows = rows.to(gates.dtype) * gates.flatten()[order, None]
        return torch.zeros_like(flat).index_add(0, token, rows.to(flat.dtype))

    def load(self, chosen: Tensor) -> Tensor:
        """Tokens sent to each expert (E,)."""
        counts = torch.zeros(self.config.n_experts, dtype=torch.long, device=chosen.device)
        return counts.scatter_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))

    def loss(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """Balance and z loss of one call, weighted."""
        share = self.load(chosen) / chosen.numel()
        balance = self.config.n_experts * (share * logits.softmax(-1).mean(0)).sum()
        return self.config.balance_loss * balance + self.config.z_loss * logits.logsumexp(-1).square().mean()


def grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x (N, d_in) up to ends[e] times weight[e] (E, d_in, d_out): (N, d_out)."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return F.grouped_mm(x.to(dtype), weight.to(dtype), offs=ends)
