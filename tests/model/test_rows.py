"""Loops by row: every row is what it would be alone, and costs what its loops cost."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from conftest import VARIANTS
from looplm.errors import ConfigError
from looplm.model.layer_inputs import Asides
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM

IDS = torch.randint(0, 40, (4, 10), generator=torch.Generator().manual_seed(7))
PER_ROW = (3, 1, 5, 3)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
BY_ROW = [name for name in VARIANTS if "act" not in name and name != "scales"]  # act and backout mix states


@pytest.fixture(params=BY_ROW)
def model(request: pytest.FixtureRequest, make_model: Callable[..., LoopedLM]) -> LoopedLM:
    return make_model(*VARIANTS[request.param])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("n_grad", [None, 2])
def test_every_row_is_what_it_would_be_alone(model: LoopedLM, n_grad: int | None, recompute: bool) -> None:
    def gradients(hidden: Tensor) -> list[Tensor | None]:
        loss = (hidden * torch.linspace(-1, 1, hidden[0].numel()).view(hidden[0].shape)).sum()
        return list(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    plan = LoopPlan(max(PER_ROW), n_grad=n_grad, recompute=recompute, per_row=PER_ROW)
    together = model.hidden(IDS, plan=plan)
    alone = torch.cat([model.hidden(IDS[[row]], plan=LoopPlan(n, n_grad=n_grad)) for row, n in enumerate(PER_ROW)])
    torch.testing.assert_close(together, alone, **CLOSE)
    for one, two in zip(gradients(together), gradients(alone), strict=True):
        assert (one is None) == (two is None)
        if one is not None and two is not None:
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_packed_documents_keep_to_their_own_row(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model(
        "smear={kind: channel, n_back: 2}", "block.attention.window=3", "block.attention.window_pattern=SL"
    )
    documents = (torch.arange(10) >= torch.tensor([[3], [5], [7], [9]])).int()
    together = model.hidden(IDS, plan=LoopPlan.of_rows(PER_ROW), documents=documents)
    for row, n_loops in enumerate(PER_ROW):
        alone = model.hidden(IDS[[row]], plan=LoopPlan(n_loops), documents=documents[[row]])
        torch.testing.assert_close(together[[row]], alone, **CLOSE)


def test_rows_that_are_done_leave_the_batch(make_model: Callable[..., LoopedLM]) -> None:
    model, n_run = make_model(), 0

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal n_run
        n_run += len(args[0])

    model.core[0].register_forward_pre_hook(count)
    model.hidden(IDS, plan=LoopPlan.of_rows(PER_ROW, n_grad=2)).sum().backward()
    assert n_run == sum(PER_ROW)


def test_router_losses_count_each_loop_once(make_model: Callable[..., LoopedLM]) -> None:
    """Two calls of a loop, with and without gradient, weigh as much as the one they are part of."""
    model = make_model("core_ffn={kind: moe, n_experts: 4, d_ff: 8, top_k: 4, balance_loss: 1.0}")
    asides = Asides()
    model.hidden(IDS, plan=LoopPlan.of_rows(PER_ROW, n_grad=2), asides=asides)
    # with every expert chosen the balance loss is 1 whatever the router says: once per layer and loop
    assert sum(asides.losses).item() == pytest.approx(len(model.core) * max(PER_ROW), rel=1e-5)
    n_chosen = sum(int(load.sum()) for _, load in asides.loads)
    assert n_chosen == len(model.core) * sum(PER_ROW) * IDS.shape[1] * 4


@pytest.mark.parametrize("by_row", [False, True])
def test_memory_of_truncated_loops_does_not_grow_with_their_number(
    make_model: Callable[..., LoopedLM], by_row: bool
) -> None:
    model = make_model("inject.kind=diagonal")

    def kept_bytes(n_loops: int, n_grad: int | None) -> int:
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        plan = LoopPlan.of_rows([n_loops] * 4, n_grad=n_grad) if by_row else LoopPlan(n_loops, n_grad=n_grad)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model.hidden(IDS, plan=plan).sum()
            total = sum(kept.values())
        loss.backward()
        return total

    assert kept_bytes(4, 2) == kept_bytes(16, 2) == kept_bytes(64, 2)
    assert kept_bytes(16, None) > 3 * kept_bytes(4, None) > 3 * kept_bytes(4, 2)


def test_plans_that_do_not_fit_are_refused(make_model: Callable[..., LoopedLM]) -> None:
    model = make_model()
    with pytest.raises(ConfigError, match="3 rows and the batch has 4"):
        model.hidden(IDS, plan=LoopPlan.of_rows([1, 2, 3]))
    with pytest.raises(ConfigError, match="give every row 1 or more"):
        LoopPlan.of_rows([2, 0, 1])
    with pytest.raises(ConfigError, match="give 1 or more"):
        LoopPlan.of_rows([])
    for overrides in (["exit={kind: act}"], ["backout=true"]):
        with pytest.raises(ConfigError, match="take another plan"):
            make_model(*overrides).hidden(IDS, plan=LoopPlan.of_rows(PER_ROW))
    cache = model.new_cache(batch_size=4, capacity=10, n_loops=5)
    positions = torch.arange(10).expand(4, 10)
    with pytest.raises(ConfigError, match="all rows run the same number"):
        model.hidden(IDS, plan=LoopPlan.of_rows(PER_ROW), cache=cache, positions=positions, n_keys=10)
