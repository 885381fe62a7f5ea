"""Memory of training, counted on tensors without memory, against what real tensors take."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import long
from looplm.data.pack import Batch
from looplm.model import moe
from looplm.model.cross_entropy import CHUNK_ROWS
from looplm.model.grouped import grouped_on_gpu
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM
from looplm.optim.groups import make_optimizers
from looplm.train.footprint import CHUNK_BYTES, Footprint, Parts, Shape, kept, measure
from looplm.train.losses import next_token_loss
from looplm.train.run import RunConfig, resolve_run

N_ROWS, ROW_LEN = 2, 576  # rows long enough for a CPU to take the kernel that a GPU takes

# one kind of attention and feed-forward each, tiny but not dominated by what is rounded up
EXPERTS = "{kind: moe, n_experts: 8, d_ff: 64, top_k: 2, n_shared: 1, balance_loss: 0.01}"
LATENT = "{kind: mla, n_heads: 4, q_rank: 64, kv_rank: 64, nope_dim: 16, rope_dim: 16, v_dim: 32}"
MODELS = {
    "dense, grouped queries": [],
    "experts": [f"model.core_ffn={EXPERTS}"],
    "latent attention": [f"model.block.attention={LATENT}"],
}


def run_config(*overrides: str) -> RunConfig:
    shape = ["model.seq_len=1024", "model.vocab_size=512", "model.d_model=128", "model.block.ffn.d_ff=256"]
    heads = ["model.block.attention.n_heads=4", "model.block.attention.n_kv_heads=2"]
    latent = any("mla" in override for override in overrides)
    return resolve_run("pretrain", overrides=[*shape, *([] if latent else heads), *overrides])


class Live(TorchDispatchMode):
    """Bytes of all storages that were made since and still live."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else (out,):
            if isinstance(part, Tensor):
                storage = part.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.now())
        return out

    def now(self) -> int:
        self.storages = {address: found for address, found in self.storages.items() if not found[0].expired()}
        return sum(n_bytes for _, n_bytes in self.storages.values())


def live_bytes(config: RunConfig, *, n_loops: int, backward: bool) -> int:
    """Bytes that a real forward leaves behind, the weights apart, or with `backward` the most while it goes back."""
    model = LoopedLM(config.model)
    ids = torch.randint(0, 512, (N_ROWS, ROW_LEN))
    batch, plan = Batch(ids, ids), LoopPlan(n_loops, recompute=config.train.recompute)
    with patch.object(moe, "grouped", grouped_on_gpu), Live() as live:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_token_loss(model, batch, plan, loop_loss=config.train.loop_loss)
        own = sum(live.storages[address][1] for address in own_addresses(model) if address in live.storages)
        live.peak = live.now()
        if backward:
            loss.backward()
    return live.peak - own


def own_addresses(model: LoopedLM) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in model.state_dict().values()}


def counted(config: RunConfig, *, n_loops: int) -> int:
    parts = measure(config.model, config.train, Shape(N_ROWS, ROW_LEN), n_loops=n_loops)
    return parts.activations + parts.loss - CHUNK_BYTES * CHUNK_ROWS * config.model.n_targets


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", [[], ["train.loop_loss={share: 0.1}"]], ids=["one loss", "loss by loop"])
def test_what_is_counted_is_what_a_real_forward_keeps(name: str, recipe: list[str]) -> None:
    config = run_config(*MODELS[name], *recipe)
    assert counted(config, n_loops=3) == pytest.approx(live_bytes(config, n_loops=3, backward=False), rel=0.03)


@pytest.mark.parametrize("name", [next(iter(MODELS)), *long(*((name,) for name in list(MODELS)[1:]))])
def test_recomputed_loops_keep_states_and_one_loop(name: str) -> None:
    config = run_config(*MODELS[name], "train.recompute=true")
    peak = live_bytes(config, n_loops=6, backward=True)
    assert peak == pytest.approx(counted(config, n_loops=6), rel=0.15)  # the coda's are gone by then
    assert counted(config, n_loops=6) < 0.5 * counted(run_config(*MODELS[name]), n_loops=6)


def test_no_copy_of_the_experts_is_kept_however_many_loops_there_are() -> None:
    few, many = (run_config(f"model.core_ffn={EXPERTS.replace('n_experts: 8', f'n_experts: {n}')}") for n in (8, 72))
    shape, n_numbers = Shape(1, 64), 64 * 3 * 128 * 64 * few.model.n_core
    more = [
        measure(many.model, many.train, shape, n_loops=n).activations
        - measure(few.model, few.train, shape, n_loops=n).activations
        for n in (1, 3)
    ]
    assert more[1] - more[0] < 0.1 * 2 * 2 * n_numbers  # of two bytes a number for each of two loops


def test_rows_are_alike_and_memory_grows_with_them() -> None:
    config = run_config()
    model = LoopedLM(config.model)
    one, two, five = (kept(model, config.train, Shape(n, 256), n_loops=2) for n in (1, 2, 5))
    assert five == one + 4 * (two - one)
    documents = kept(model, config.train, Shape(1, 256, has_documents=True), n_loops=2)
    assert documents - one >= 2 * 256 * 256 * 4  # a mask of two bytes for each of prelude, two cores, twice, and coda


@pytest.mark.parametrize(
    ("optimizer", "bytes_a_number"),
    [("{matrices: adamw}", 8), ("{matrices: lion, others: lion}", 4), ("{matrices: muon, others: lion}", 4)],
)
def test_optimizer_state_is_what_the_optimizers_hold(optimizer: str, bytes_a_number: int) -> None:
    config = run_config(f"train.optimizer={optimizer}")
    model = LoopedLM(config.model)
    parts, n = (
        measure(config.model, config.train, Shape(1, 64), n_loops=1),
        sum(p.numel() for p in model.parameters()),
    )
    assert parts.weights == 4 * n
    assert parts.optimizer == pytest.approx(bytes_a_number * n, rel=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    real = 0
    for one in make_optimizers(model, config.train.optimizer):
        one.step()
        real += sum(tensor.nbytes for state in one.state.values() for tensor in state.values())
    assert parts.optimizer == real


def test_normuon_keeps_a_row_more_and_an_average_a_copy() -> None:
    def optimizer(*overrides: str) -> int:
        config = run_config(*overrides)
        return measure(config.model, config.train, Shape(1, 64), n_loops=1).optimizer

    muon, normuon = (optimizer(f"train.optimizer.matrices={kind}") for kind in ("muon", "normuon"))
    assert muon < normuon < 1.02 * muon
    config = run_config()
    weights = measure(config.model, config.train, Shape(1, 64), n_loops=1).weights
    assert optimizer("train.ema=0.999") - optimizer() == weights


def test_how_parts_are_shared() -> None:
    parts = Parts(weights=80, optimizer=160, gathered=30, activations=500, loss=7)
    assert parts.replicated() == parts.sharded(1, accumulates=True) == Footprint(80, 80, 160, 0, 500, 7)
    assert parts.sharded(8, accumulates=False) == Footprint(10, 10, 20, 60, 500, 7)
    assert parts.sharded(8, accumulates=True) == Footprint(10, 10, 20, 110, 500, 7)
    assert parts.sharded(8, accumulates=True).total == 657


def test_halting_gates_and_states_in_the_loss_can_be_counted() -> None:
    halting = resolve_run("pretrain", overrides=["data.row_len=64"], model="mythos-tiny")
    assert measure(halting.model, halting.train, Shape(1, 64), n_loops=4).activations > 0
    gate = run_config("model.exit={kind: gate}", "train.exit_gate={}")
    state = run_config("train.state_loss={jacobian: 1.0, norm: 0.1}")
    plain = run_config()
    sizes = [measure(each.model, each.train, Shape(1, 64), n_loops=2).loss for each in (plain, gate, state)]
    assert sizes[2] > sizes[0]
    assert min(sizes) > 0
