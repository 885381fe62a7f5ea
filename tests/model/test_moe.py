"""Experts against a plain loop over tokens."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import tiny_config
from looplm.errors import ConfigError
from looplm.model.layer_inputs import Asides, LayerInputs, layer_inputs
from looplm.model.linear import FullConfig, HRAConfig
from looplm.model.moe import MoE, MoEConfig
from looplm.model.rope import RopeConfig

D = 16


def make(linear: FullConfig | HRAConfig | None = None, **options: object) -> MoE:
    config = MoEConfig.model_validate({"n_experts": 5, "d_ff": 8, "top_k": 2} | options)
    moe = MoE(D, config, linear or FullConfig(), layer_idx=0)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    if moe.bias is not None:
        torch.nn.init.normal_(moe.bias)
    return moe


def inputs_at(loop_idx: int) -> LayerInputs:
    inputs = layer_inputs(torch.zeros(1, 1, dtype=torch.long), rope_dim=4, rope=RopeConfig(), windows={None})
    inputs.loop_idx = torch.tensor(loop_idx)
    return inputs


def by_hand(moe: MoE, token: Tensor, *, loop_idx: int) -> Tensor:
    """One token through the experts it chooses."""
    config = moe.config
    read = token
    if moe.loop_embed is not None:
        read = torch.cat((token, moe.loop_embed.weight[min(loop_idx, len(moe.loop_embed.weight) - 1)]))
    logits = moe.router.weight @ read
    order = (logits if moe.bias is None else logits + moe.bias).argsort(descending=True)[: config.top_k]
    gates = logits.softmax(0)[order] if config.gate == "softmax" else logits[order].sigmoid()
    if config.renormalise:
        gates = gates / gates.sum()
    out = torch.zeros(D)
    for gate, index in zip(gates, order, strict=True):

        def apply(part: object, x: Tensor, index: Tensor = index) -> Tensor:
            y = x @ part.weight[index]  # type: ignore[attr-defined]
            if part.scale:  # type: ignore[attr-defined]
                y = y + part.scale * (x @ part.a[index]) @ part.b[index]  # type: ignore[attr-defined]
            return y

        out = out + gate * apply(moe.down, F.silu(apply(moe.gate, token)) * apply(moe.up, token))
    for shared in moe.shared:
        out = out + shared(token[None], inputs_at(loop_idx))[0]
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gate": "sigmoid", "renormalise": False, "top_k": 1},
        {"n_shared": 2, "shared_d_ff": 12, "has_bias": True},
        {"n_loop_embeds": 2, "top_k": 5},
        {"n_experts": 8},
    ],
)
@pytest.mark.parametrize("linear", [FullConfig(), HRAConfig(rank=4, scale=0.5)], ids=["full", "hra"])
def test_experts_are_a_loop_over_tokens(options: dict[str, object], linear: FullConfig | HRAConfig) -> None:
    moe = make(linear, **options)
    x = torch.randn(2, 7, D)
    for loop_idx in (0, 1, 4):
        out = moe(x, inputs_at(loop_idx))
        expected = torch.stack([torch.stack([by_hand(moe, t, loop_idx=loop_idx) for t in row]) for row in x])
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        for n_tokens in (1, 5, 14):  # at inference: by choice, by expert or with 8 experts sorted, by expert
            with torch.inference_mode():
                few = moe(x.flatten(0, 1)[None, :n_tokens], inputs_at(loop_idx))
            torch.testing.assert_close(few, expected.flatten(0, 1)[None, :n_tokens], rtol=1e-4, atol=1e-5)


def test_an_even_router_has_balance_loss_one_and_a_collapsed_one_more() -> None:
    moe = make(balance_loss=1.0, top_k=1, n_experts=4)
    even = torch.eye(4).repeat(5, 1) * 1e-4
    assert moe.loss(even, moe.load(even.topk(1).indices)).item() == pytest.approx(1.0, abs=1e-3)
    collapsed = torch.tensor([[9.0, 0, 0, 0]]).repeat(20, 1)
    assert moe.loss(collapsed, moe.load(collapsed.topk(1).indices)).item() > 3.5


def test_gradients_reach_experts_and_router() -> None:
    moe = make(balance_loss=0.1)
    inputs = inputs_at(0)
    inputs.asides = Asides()
    (moe(torch.randn(1, 30, D), inputs).sum() + torch.stack(inputs.asides.losses).sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in moe.parameters())


def test_beyond_its_capacity_an_expert_adds_nothing_and_keeps_its_largest_gates() -> None:
    moe = make(top_k=1, n_experts=2, capacity_factor=0.5, renormalise=False)  # 5 tokens for each of 2 experts
    x = torch.randn(1, 20, D)
    free = moe(x, inputs_at(0))[0]
    inputs = inputs_at(0)
    inputs.asides = Asides()
    limited = moe(x, inputs)[0]
    logits = moe.route(x[0], torch.tensor(0))
    gates, experts = logits.softmax(-1).max(-1)
    for expert in range(2):
        own = (experts == expert).nonzero().flatten()
        best = own[gates[own].argsort(descending=True)[: moe.capacity(n_tokens=20)]]
        dropped = [int(token) for token in own if token not in best]
        torch.testing.assert_close(limited[best], free[best])
        assert limited[dropped].abs().sum() == 0
    ((layer_idx, load),) = inputs.asides.loads
    assert (layer_idx, load.tolist()) == (0, [int((experts == expert).sum()) for expert in range(2)])


def test_the_bias_moves_towards_an_even_load() -> None:
    moe = make(has_bias=True, bias_rate=0.1, n_experts=3)
    assert moe.bias is not None
    torch.nn.init.zeros_(moe.bias)
    moe.balance(torch.tensor([9, 0, 3]))
    moe.balance(torch.tensor([4, 4, 4]))
    torch.testing.assert_close(moe.bias, torch.tensor([-0.1, 0.1, 0.1]))


def test_impossible_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="top_k 9 is more than n_experts 4"):
        tiny_config("core_ffn={kind: moe, n_experts: 4, d_ff: 8, top_k: 9}")
    with pytest.raises(ConfigError, match="moves a bias that is not there"):
        tiny_config("core_ffn={kind: moe, n_experts: 4, d_ff: 8, top_k: 1, bias_rate: 0.1}")
    with pytest.raises(ConfigError, match="do not go together"):
        tiny_config("block.linear={kind: low_rank, rank: 2}", "block.ffn={kind: moe, n_experts: 4, d_ff: 8, top_k: 1}")
