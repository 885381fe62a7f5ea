"""Mixture of experts: a router sends every token to its top_k experts, each a SwiGLU; shared experts see all tokens.

Tokens are sorted by expert and every projection is one grouped product over all experts (grouped.py): a Python loop
over 64 experts takes 10 to 20 times as long. Few tokens at inference are not worth sorting. At inference no token is
ever dropped, so a token's output depends on no other token; in training a capacity may drop some.
Shapes: B batch, T tokens, N tokens of the batch, E experts, k experts per token, D width.
"""

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from looplm.config import MOST_LAYERS, Config, Loops, NonNegativeFloat, NonNegativeInt, PositiveFloat, Size
from looplm.model.grouped import combine, dispatch, grouped
from looplm.model.layer_inputs import LayerInputs
from looplm.model.linear import HRAConfig, LinearConfig, LowRankConfig
from looplm.model.swiglu import SwiGLU

# Tokens up to which inference may put every token through every expert.
FEW_TOKENS = 32
# Choices (token, expert) up to which inference reads a matrix for each. Uncompiled, each matrix is copied first;
# compiled code copies none, and there the limit is the number of experts.
FEW_CHOICES = 8


class MoEConfig(Config):
    """Experts behind a linear router."""

    kind: Literal["moe"] = "moe"
    n_experts: Size
    """Experts to choose from."""
    d_ff: Size
    """Inner width of one."""
    top_k: Size
    """Experts per token."""
    n_shared: NonNegativeInt = Field(default=0, le=MOST_LAYERS)
    """Experts that every token goes through, ungated."""
    shared_d_ff: Size | None = None
    """Inner width of a shared one; null for d_ff."""
    gate: Literal["softmax", "sigmoid"] = "softmax"
    """What turns router logits into gates."""
    renormalise: bool = True
    """Divide the chosen gates by their sum."""
    n_loop_embeds: Loops | None = None
    """Loops with a learned embedding, which the router reads beside the token; later loops use the last one; null for
    none."""
    has_bias: bool = False
    """Keep a bias per expert that moves the choice, not the gate: a buffer, which gets no gradient."""
    bias_rate: NonNegativeFloat = Field(default=0.0, le=1)
    """Step of the bias after every update: up for experts with less than the mean load, down for the others
    (DeepSeek-V3, 2024); 0 never moves it."""
    capacity_factor: PositiveFloat | None = None
    """In training an expert takes at most this many times its even share of a batch, the tokens with the largest gates
    (V-MoE, 2021); null for no limit. Never at inference: there, later tokens and other rows would decide."""
    balance_loss: NonNegativeFloat = 0.0
    """Weight of n_experts * sum(share of tokens * mean router probability), 1 when even (Switch)."""
    z_loss: NonNegativeFloat = 0.0
    """Weight of mean(logsumexp(logits)^2)."""

    @model_validator(mode="after")
    def _possible(self) -> "MoEConfig":
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}")
        if self.bias_rate and not self.has_bias:
            raise ValueError(f"bias_rate {self.bias_rate} moves a bias that is not there: set has_bias to true")
        return self

    @property
    def is_balanced(self) -> bool:
        """Whether training does anything about the load or the logits."""
        return bool(self.balance_loss or self.z_loss or self.bias_rate)


class ExpertLinear(nn.Module):
    """One bias-free linear map per expert, (N, d_in) sorted by expert to (N, d_out); `ends` (E,) are running counts."""

    def __init__(self, n_experts: int, d_in: int, d_out: int, *, linear: LinearConfig) -> None:
        super().__init__()
        assert not isinstance(linear, LowRankConfig), "refused by BlockConfig"
        # (E, d_in, d_out), where nn.Linear has (d_out, d_in): F.grouped_mm takes x @ weight
        self.weight = nn.Parameter(torch.empty(n_experts, d_in, d_out))
        # 0 stands for no thin product beside the matrix
        self.scale = linear.scale if isinstance(linear, HRAConfig) else 0.0
        if isinstance(linear, HRAConfig):
            self.a = nn.Parameter(torch.empty(n_experts, d_in, linear.rank))
            self.b = nn.Parameter(torch.empty(n_experts, linear.rank, d_out))

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        y = grouped(x, self.weight, ends)
        return y + self.scale * grouped(grouped(x, self.a, ends), self.b, ends) if self.scale else y

    def one_each(self, x: Tensor, experts: Tensor | None = None) -> Tensor:
        """x (G, n, d_in), a group for each of `experts` (G,), or for every expert in order: (G, n, d_out)."""
        y = x @ (self.weight if experts is None else self.weight.index_select(0, experts))
        if not self.scale:
            return y
        a, b = (thin if experts is None else thin.index_select(0, experts) for thin in (self.a, self.b))
        return y + self.scale * (x @ a @ b)


class MoE(nn.Module):
    """(B, T, D) to (B, T, D)."""

    def __init__(self, d_model: int, config: MoEConfig, linear: LinearConfig, *, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.router = nn.Linear(d_model * (2 if config.n_loop_embeds else 1), config.n_experts, bias=False)
        self.loop_embed = nn.Embedding(config.n_loop_embeds, d_model) if config.n_loop_embeds else None
        self.gate = ExpertLinear(config.n_experts, d_model, config.d_ff, linear=linear)
        self.up = ExpertLinear(config.n_experts, d_model, config.d_ff, linear=linear)
        self.down = ExpertLinear(config.n_experts, config.d_ff, d_model, linear=linear)
        shared_d_ff = config.shared_d_ff or config.d_ff
        self.shared = nn.ModuleList(SwiGLU(d_model, shared_d_ff, linear) for _ in range(config.n_shared))
        self.register_buffer("bias", torch.zeros(config.n_experts) if config.has_bias else None)
        self.bias: Tensor | None

    def reset(self) -> None:
        """No expert is preferred."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, inputs: LayerInputs) -> Tensor:
        flat = x.flatten(0, 1)  # (N, D)
        logits = self.route(flat, inputs.loop_idx)  # (N, E)
        # the bias moves which experts are chosen, never the gates: evening the load changes no weight in the sum
        chosen = (logits if self.bias is None else logits + self.bias).topk(self.config.top_k, dim=-1).indices  # (N, k)
        gates = self.gates(logits, chosen)
        # only training hands in `asides`: losses, loads and a capacity exist there alone
        capacity = None
        if inputs.asides is not None:
            load = self.load(chosen)
            inputs.asides.losses.append(self.loss(logits, load))
            inputs.asides.loads.append((self.layer_idx, load))
            capacity = self.capacity(n_tokens=len(flat))
        gates = gates.to(x.dtype)
        # under autocast the first two ways run in another type than the sorted one: a row would depend on its batch
        is_plain = not torch.is_autocast_enabled(x.device.type)
        at_inference = is_plain and inputs.asides is None and not torch.is_grad_enabled()
        # three ways to the same sums: a matrix for each choice, all experts for all tokens, or tokens sorted by expert
        n_experts = self.config.n_experts
        if at_inference and chosen.numel() <= (n_experts if torch.compiler.is_compiling() else FEW_CHOICES):
            mixed = self._by_choice(flat, chosen, gates)
        elif at_inference and chosen.numel() >= 2 * n_experts and len(flat) <= FEW_TOKENS:
            mixed = self._by_expert(flat, chosen, gates)
        else:
            mixed = self._sorted(flat, chosen, gates, self.load(chosen), capacity=capacity)
        # shared experts see every token and have no gate
        for expert in self.shared:
            mixed = mixed + expert(flat, inputs)
        return mixed.view(x.shape)

    def gates(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """What the outputs of the chosen experts (N, k) are multiplied with, (N, k) in fp32."""
        gates = (logits.softmax(-1) if self.config.gate == "softmax" else logits.sigmoid()).gather(1, chosen)
        return gates / gates.sum(-1, keepdim=True) if self.config.renormalise else gates

    def route(self, flat: Tensor, loop_idx: Tensor) -> Tensor:
        """Router logits (N, E) in fp32."""
        if self.loop_embed is not None:
            assert self.config.n_loop_embeds is not None
            # loops beyond the learned embeddings read the last one
            embed = self.loop_embed(loop_idx.clamp(max=self.config.n_loop_embeds - 1))
            flat = torch.cat((flat, embed.to(flat.dtype).expand_as(flat)), dim=-1)
        return self.router(flat).float()

    def _by_choice(self, flat: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """As `_sorted`, where sorting would cost more than the products: every choice by itself."""
        experts = chosen.flatten()
        # reads N k matrices of weights, so it pays only while N k is small
        rows = flat.repeat_interleave(self.config.top_k, dim=0)[:, None]  # (N k, 1, D)
        inner = F.silu(self.gate.one_each(rows, experts)) * self.up.one_each(rows, experts)
        return (self.down.one_each(inner, experts).view(*chosen.shape, -1) * gates[..., None]).sum(1)

    def _by_expert(self, flat: Tensor, chosen: Tensor, gates: Tensor) -> Tensor:
        """As `_sorted`, for few tokens that use most experts: every token goes through all of them."""
        rows = flat.expand(self.config.n_experts, -1, -1)  # (E, N, D)
        rows = self.down.one_each(F.silu(self.gate.one_each(rows)) * self.up.one_each(rows))
        # the gates of the chosen experts, 0 for all others
        shares = gates.new_zeros(len(flat), self.config.n_experts).scatter(1, chosen, gates).T[..., None]  # (E, N, 1)
        # where, not a product with 0: an expert that was not chosen may overflow, and 0 * inf is NaN
        return torch.where(shares == 0, 0, rows * shares).sum(0)

    def _sorted(self, flat: Tensor, chosen: Tensor, gates: Tensor, load: Tensor, *, capacity: int | None) -> Tensor:
        """Sum of the chosen experts' outputs times their gates, (N, D); beyond `capacity` an expert adds nothing."""
        experts, k = chosen.flatten(), self.config.top_k
        gates = gates.flatten()
        if capacity is None:
            # stable: an expert's rows keep the order of the tokens, so that sums over them always add in one order
            order = experts.argsort(stable=True)  # token-choices by expert
        else:
            order = gates.argsort(descending=True, stable=True)
            order = order[experts[order].argsort(stable=True)]  # by expert, largest gates first
            # rank of a choice among its expert's, the largest gate first; from `capacity` on its gate becomes 0
            rank = torch.arange(len(order), device=order.device) - (load.cumsum(0) - load)[experts[order]]
            gates = gates.index_put((order,), gates[order] * (rank < capacity))
        inverse = order.argsort()
        ends = load.cumsum(0).to(torch.int32)
        rows = dispatch(flat, order, inverse, k=k)
        rows = self.down(F.silu(self.gate(rows, ends)) * self.up(rows, ends), ends)
        rows = rows.to(gates.dtype) * gates.index_select(0, order)[:, None]
        return combine(rows, order, inverse, k=k).to(flat.dtype)

    def load(self, chosen: Tensor) -> Tensor:
        """Tokens sent to each expert (E,)."""
        counts = torch.zeros(self.config.n_experts, dtype=torch.long, device=chosen.device)
        return counts.scatter_add(0, chosen.flatten(), torch.ones_like(chosen.flatten()))

    def capacity(self, *, n_tokens: int) -> int | None:
        """Tokens that an expert takes of a batch of `n_tokens` in training."""
        factor = self.config.capacity_factor
        return None if factor is None else math.ceil(factor * n_tokens * self.config.top_k / self.config.n_experts)

    @torch.no_grad()
    def balance(self, load: Tensor) -> None:
        """Move the bias by one step, given the tokens (E,) sent to each expert since the last one."""
        if self.bias is not None and self.config.bias_rate:
            # only the sign counts: a step is as large however uneven the load is
            self.bias += self.config.bias_rate * (load.float().mean() - load).sign()

    def loss(self, logits: Tensor, load: Tensor) -> Tensor:
        """Balance and z loss of one call, weighted, given its load (E,)."""
        # counts have no gradient: it flows through the mean probability alone
        share = load / load.sum()
        balance = self.config.n_experts * (share * logits.softmax(-1).mean(0)).sum()
        return self.config.balance_loss * balance + self.config.z_loss * logits.logsumexp(-1).square().mean()


def total_loads(loads: Iterable[tuple[int, Tensor]]) -> dict[int, Tensor]:
    """The tokens sent to each expert (E,) by layer, over all calls of it."""
    total: dict[int, Tensor] = {}
    for layer_idx, load in loads:
        total[layer_idx] = total[layer_idx] + load if layer_idx in total else load
    return total
