"""What training takes of a GPU's memory, measured and not a formula: the run's own loss and optimizers go over tensors
without memory, and what autograd keeps and optimizers allocate is counted. A model of ten billion takes seconds.

It is that of uncompiled layers. Not counted is what lives for moments: gradients of activations,
the optimizer's own products, buffers of the collectives, fragments.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from looplm.checkpoint import own_tensors
from looplm.data.pack import Batch
from looplm.model import attention, layer_inputs, mla, moe
from looplm.model.cross_entropy import CHUNK_ROWS
from looplm.model.grouped import grouped_on_gpu
from looplm.model.layer_inputs import Asides, Mask
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.optim.groups import make_optimizers
from looplm.train import losses
from looplm.train.fit import TrainConfig

CHUNK_BYTES = 28  # of a logit while its uncompiled chunk is scored: fp32 six times, bf16 twice; 24 without a softcap


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU."""

    weights: int
    """Parameters and buffers, fp32."""
    gradients: int
    """Of them; with DDP they are the buckets that it sums."""
    optimizer: int
    """Its state, and the moving average of the weights if there is one."""
    gathered: int
    """Sharded: weights that are whole while they are used, and their gradients."""
    activations: int
    """What autograd keeps of the model, bf16 copies of the weights (but the experts) included."""
    loss: int
    """What it keeps of the losses, the head's gradient included, and the logits of one chunk."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.gathered + self.activations + self.loss


@dataclass(frozen=True)
class Parts:
    """Bytes before anything is shared out."""

    weights: int
    optimizer: int
    gathered: int
    activations: int
    loss: int

    def replicated(self) -> Footprint:
        """Everything on each GPU (DDP)."""
        return Footprint(self.weights, self.weights, self.optimizer, 0, self.activations, self.loss)

    def sharded(self, n_gpus: int, *, accumulates: bool) -> Footprint:
        """Weights, gradients and optimizer state shared by `n_gpus` (FSDP); one shares them with nobody. Where it
        accumulates over several micro-batches, a rank keeps whole gradients of everything until the last."""
        if n_gpus == 1:
            return self.replicated()
        weights, optimizer = -(-self.weights // n_gpus), -(-self.optimizer // n_gpus)
        gathered = self.gathered + (self.weights if accumulates else self.gathered)
        return Footprint(weights, weights, optimizer, gathered, self.activations, self.loss)


@dataclass(frozen=True)
class Shape:
    """A micro-batch."""

    n_rows: int
    row_len: int
    has_documents: bool = False
    """Whether tokens see their own document alone."""

    @property
    def n_tokens(self) -> int:
        """Tokens of it."""
        return self.n_rows * self.row_len


def measure(config: ModelConfig, train: TrainConfig, shape: Shape, *, n_loops: int) -> Parts:
    """The parts of a run with micro-batches of `shape` and `n_loops` loops with gradient."""
    with FakeTensorMode():
        model = LoopedLM(config)
        whole, of_model = (
            _of_rows(model, train, shape, n_loops=n_loops, with_loss=with_loss) for with_loss in (True, False)
        )
        n_scored = CHUNK_ROWS if train.exit_gate is None else shape.n_tokens
        return Parts(
            weights=_bytes(own_tensors(model).values()),
            optimizer=_optimizer_bytes(model, train),
            gathered=_gathered(model),
            activations=of_model,
            loss=whole - of_model + CHUNK_BYTES * n_scored * config.n_targets,
        )


def _of_rows(model: LoopedLM, train: TrainConfig, shape: Shape, *, n_loops: int, with_loss: bool) -> int:
    """Bytes kept of a micro-batch. Rows are alike: two say what any number keeps."""
    one, two = (kept(model, train, replace(shape, n_rows=n), n_loops=n_loops, with_loss=with_loss) for n in (1, 2))
    return one + (shape.n_rows - 1) * (two - one)


def kept(model: LoopedLM, train: TrainConfig, shape: Shape, *, n_loops: int, with_loss: bool = True) -> int:
    """Bytes that autograd keeps of a forward, the model's own tensors apart; with `train.recompute` when the backward
    pass has just computed a loop again."""
    ids = torch.zeros(shape.n_rows, shape.row_len, dtype=torch.long)
    batch = Batch(ids, torch.zeros_like(ids), torch.zeros_like(ids) if shape.has_documents else None)

    def forward(n_loops: int, recompute: bool) -> Tensor:
        plan = LoopPlan(n_loops, recompute=recompute)
        if not with_loss:
            return model.hidden(ids, plan=plan, documents=batch.documents, asides=Asides())
        if train.exit_gate is not None:
            return losses.exit_gate_loss(model, batch, plan, train.exit_gate, alone=False)
        return losses.next_token_loss(
            model,
            batch,
            plan,
            label_smoothing=train.label_smoothing,
            loop_loss=train.loop_loss,
            state_loss=train.state_loss,
        )

    def saved(n_loops: int, *, recompute: bool = False) -> int:
        with _as_on_a_gpu(model):
            return saved_bytes(lambda: forward(n_loops, recompute), model, bf16=train.runtime.precision != "fp32")

    if not train.recompute:
        return saved(n_loops)
    return saved(n_loops, recompute=True) + saved(1) - saved(1, recompute=True)


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module, *, bf16: bool = True) -> int:
    """Bytes of the distinct storages that autograd saves in `forward`, under autocast or not, the model's own apart."""
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that its address names no other
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        forward()
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


@contextmanager
def _as_on_a_gpu(model: LoopedLM) -> Iterator[None]:
    """Tensors without memory pass for a CPU's, which takes other ways, and have no values to be asked for: every
    position is scored, no loop left out, and attention and experts go as they do on a GPU."""
    replaced: list[tuple[Any, str, Any]] = [
        (losses, "_scored", lambda batch: torch.arange(batch.targets.numel())),
        (model.exit, "is_settled", lambda halting: False),
        (layer_inputs, "MAX_WRITTEN_OUT", 0),
        (attention, "attend", _attend_on_gpu),
        (mla, "attend", _attend_on_gpu),
        (moe, "grouped", grouped_on_gpu),
    ]
    with ExitStack() as stack:
        for holder, name, stand_in in replaced:
            stack.enter_context(patch.object(holder, name, stand_in))
        yield


def _attend_on_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float | None = None) -> Tensor:
    mixed: Tensor = _Attention.apply(q, k, v, None if mask.seen is None else mask.seen.to(q.dtype))
    return mixed


class _Attention(torch.autograd.Function):
    """What the fused kernels keep: their inputs, a mask as a bias, the result, and a logarithm a row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        mixed = q.new_empty(*q.shape[:-1], v.shape[-1])
        log_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, bias, mixed, log_sums)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        raise AssertionError("there is nothing to go back through")


def _optimizer_bytes(model: LoopedLM, train: TrainConfig) -> int:
    """What the optimizers hold after a step, and the average."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    total = 0
    for optimizer in make_optimizers(model, train.optimizer):
        optimizer.step()
        total += _bytes(part for state in optimizer.state.values() for part in state.values())
    model.zero_grad(set_to_none=True)
    return total + (0 if train.ema is None else _bytes(own_tensors(model).values()))


def _gathered(model: LoopedLM) -> int:
    """Bytes of the weights that are whole at once: core, the largest layer beside it, and what is no layer."""
    beside = [_size(block) for part in (model.prelude, model.coda) for block in part]
    core = _size(model.core)
    rest = _size(model) - core - sum(beside)
    return core + max(beside, default=0) + rest


def _size(module: nn.Module) -> int:
    return _bytes(module.parameters())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
