"""Each part against a plain formula."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import long, tiny_config
from looplm.model.attention import GQA, GQAConfig, attend
from looplm.model.init import OUTPUT_PROJECTION
from looplm.model.layer_inputs import LayerInputs, Mask, Place, layer_inputs
from looplm.model.linear import FullConfig, LowRankConfig, make_linear
from looplm.model.loop.inject import DiagonalInject, DiagonalInjectConfig, GateInject, GateInjectConfig
from looplm.model.looped import LoopedLM
from looplm.model.norm import RMSNorm
from looplm.model.rope import RopeConfig, apply_rope, rope_tables
from looplm.model.smear import ChannelSmearConfig, Smear


def test_rmsnorm_is_x_over_its_root_mean_square() -> None:
    norm = RMSNorm(8, eps=1e-6)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)


def test_rope_turns_channel_pairs_and_keeps_dot_products_relative() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def turned(x: torch.Tensor, position: int) -> torch.Tensor:
        return apply_rope(x, *rope_tables(torch.tensor([position]), head_dim=8, config=RopeConfig(base=100.0)))

    pairs = torch.complex(q[..., :4], q[..., 4:])
    angles = 5 * 100.0 ** -(torch.arange(4) / 4)
    expected = pairs * torch.polar(torch.ones(4), angles)
    torch.testing.assert_close(turned(q, 5), torch.cat([expected.real, expected.imag], dim=-1))
    near = (turned(q, 9) * turned(k, 4)).sum()
    far = (turned(q, 105) * turned(k, 100)).sum()
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def attention_parts(*, n_tokens: int, documents: Tensor | None = None) -> tuple[Mask, list[Tensor]]:
    """The mask shared by the layers, and random q, k, v (2, 3, T, 4)."""
    inputs = some_inputs(torch.zeros(2, n_tokens, dtype=torch.long), head_dim=4, documents=documents)
    return inputs.masks[None], [torch.randn(2, 3, n_tokens, 4, dtype=torch.double) for _ in range(3)]


def some_inputs(ids: Tensor, *, head_dim: int, documents: Tensor | None = None) -> LayerInputs:
    return layer_inputs(ids, rope_dim=head_dim, rope=RopeConfig(), windows={None}, documents=documents)


@pytest.mark.parametrize("block", [128, 2, 1])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("has_gradient", [False, True])
def test_attention_is_softmax_of_scaled_scores(
    has_gradient: bool, is_packed: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("looplm.model.attention.BLOCK", block)
    documents = torch.tensor([[1, 1, 2, 2, 2], [1, 2, 3, 3, 0]]) if is_packed else None
    with torch.set_grad_enabled(has_gradient):
        mask_of, (q, k, v) = attention_parts(n_tokens=5, documents=documents)
        assert (mask_of.bias is not None) == has_gradient
        mixed = attend(q, k, v, mask_of)
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 5, 5)
    if documents is not None:
        mask = mask & (documents[:, :, None] == documents[:, None])
    scores = torch.einsum("bhtk,bhsk->bhts", q, k) / 2
    expected = torch.einsum("bhts,bhsk->bhtk", scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1), v)
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("block", [128, 2, 1])
def test_written_out_gradients_are_right(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("looplm.model.attention.BLOCK", block)
    mask, parts = attention_parts(n_tokens=5, documents=torch.tensor([[1, 1, 2, 2, 2], [1, 2, 3, 3, 0]]))
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, mask), [x.requires_grad_() for x in parts])


@pytest.mark.parametrize(
    ("n_tokens", "precision"),
    [(336, torch.bfloat16), *long((336, torch.float32), (64, torch.bfloat16), (64, torch.float32))],
)
def test_compiled_gradients_of_attention_are_those_of_eager(n_tokens: int, precision: torch.dtype) -> None:
    """Compiled CPU kernels have given NaN here, by shape and by how the formula was written (docs/log.md)."""
    config = GQAConfig(n_heads=3, n_kv_heads=3, head_dim=64, qk_norm="before_rope")
    layer = GQA(192, config, FullConfig(), norm_eps=1e-6, norm_weight=True, place=Place(0, 1, 8))
    documents = (torch.arange(4 * n_tokens) // 50).view(4, n_tokens)
    inputs = some_inputs(documents, head_dim=64, documents=documents)
    x = torch.randn(4, n_tokens, 192)
    gradients = []
    for run in (layer, torch.compile(layer, dynamic=False)):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            mixed = run(x, inputs)
        mixed.float().square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in layer.named_parameters()})  # type: ignore[union-attr]
    for name, expected in gradients[0].items():
        tolerance = 0.03 if precision == torch.bfloat16 else 1e-4
        assert (gradients[1][name] - expected).norm() < tolerance * expected.norm(), name


def test_low_rank_linear_has_rank_times_both_widths() -> None:
    linear = make_linear(LowRankConfig(rank=3), 10, 7)
    assert sum(p.numel() for p in linear.parameters()) == 3 * (10 + 7)
    assert torch.linalg.matrix_rank(linear.up.weight @ linear.down.weight) == 3


def test_gate_mixes_state_and_entry_after_the_first_loop() -> None:
    gate = GateInject(GateInjectConfig(init=0.5))
    state, entry = torch.randn(2, 3), torch.randn(2, 3)
    g = 1 / (1 + math.exp(-0.5))
    assert g == pytest.approx(0.622, abs=1e-3)
    assert torch.equal(gate.enter(None, entry, loop_idx=0), entry)
    torch.testing.assert_close(gate.enter(state, entry, loop_idx=1), g * state + (1 - g) * entry)


@pytest.mark.parametrize("n_loops", [1, 3])
def test_the_gate_gets_gradient_only_with_more_than_one_loop(make_model: Callable[..., LoopedLM], n_loops: int) -> None:
    model = make_model("inject.kind=gate")
    model(torch.tensor([[1, 2, 3]]), n_loops=n_loops).logits.sum().backward()
    assert (model.inject.think_gate.grad is not None) == (n_loops > 1)


def test_diagonal_decay_starts_at_root_one_fifth() -> None:
    inject = DiagonalInject(6, DiagonalInjectConfig(), norm_eps=1e-6)
    torch.testing.assert_close(inject.decay(), torch.full((6,), math.sqrt(1 / 5)))


@pytest.mark.parametrize("extreme", [-1e9, -100.0, -20.0, 0.0, 20.0])
def test_diagonal_decay_stays_below_one_in_fp32(extreme: float) -> None:
    inject = DiagonalInject(4, DiagonalInjectConfig(), norm_eps=1e-6)
    for parameter in (inject.A_log, inject.dt_bias):
        torch.nn.init.constant_(parameter, extreme)
        decay = inject.decay()
        assert decay.dtype == torch.float32
        assert bool((decay < 1).all())
        assert bool((decay >= 0).all())


def test_diagonal_update_is_decay_times_state_plus_dt_times_b_of_normed_entry() -> None:
    inject = DiagonalInject(6, DiagonalInjectConfig(output_map=True), norm_eps=1e-6)
    for parameter in inject.parameters():
        torch.nn.init.normal_(parameter)
    entry, state = torch.randn(2, 6), torch.randn(2, 6)
    dt = F.softplus(inject.dt_bias)
    expected = inject.decay() * state + dt * (inject.norm(entry) @ inject.B.weight.T)
    torch.testing.assert_close(inject.enter(state, inject.prepare(entry), loop_idx=1), expected)
    torch.testing.assert_close(inject.read_out(state), state @ inject.C.weight.T)


def test_smear_adds_weighted_earlier_embeddings() -> None:
    smear = Smear(4, ChannelSmearConfig(n_back=2))
    torch.nn.init.normal_(smear.weight)
    x = torch.randn(1, 5, 4)
    expected = x.clone()
    for t in range(5):
        for distance in (1, 2):
            if t >= distance:
                expected[0, t] += smear.weight[distance - 1] * x[0, t - distance]
    torch.testing.assert_close(smear(x), expected)


def test_scaled_init_makes_every_layer_the_identity() -> None:
    model = LoopedLM(tiny_config("init=scaled"))
    ids = torch.tensor([[1, 2, 3]])
    torch.testing.assert_close(model(ids, n_loops=3).hidden, model.norm(model.embed(ids)))
    zeroed = [name for name, p in model.named_parameters() if OUTPUT_PROJECTION.search(name)]
    assert len(zeroed) == 2 * len(list(model.blocks()))
