"""The GPU memory that training takes, counted instead of put into a formula: the run's own loss and optimizers run on
tensors without memory, and what autograd keeps and the optimizers allocate is added up. Ten billion parameters take
seconds.

The layers are counted uncompiled. Short-lived memory is not counted: gradients of activations, the optimizer's
products, buffers of the collectives, fragments.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

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
from looplm.train.options import TrainConfig

CHUNK_BYTES = 28  # per logit while its uncompiled chunk is scored: six fp32 and two bf16 copies; 24 without a softcap


@dataclass(frozen=True)
class Footprint:
    """Bytes on one GPU."""

    weights: int
    """Parameters and buffers, fp32."""
    gradients: int
    """Gradients of the parameters; with DDP they lie in its buckets."""
    optimizer: int
    """State of the optimizers, and the moving average of the weights if there is one."""
    gathered: int
    """Sharded: weights that are whole while they are used, and their gradients."""
    activations: int
    """What autograd keeps of the model, with the bf16 copies of all weights but the experts'."""
    loss: int
    """What autograd keeps of the losses, the head's gradient included, and the logits of one chunk."""

    @property
    def total(self) -> int:
        """Bytes in all."""
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
        """Weights, gradients and optimizer state sharded over `n_gpus` (FSDP); on one GPU all of them. A run that
        accumulates over several micro-batches keeps whole gradients of all parameters until the last one."""
        if n_gpus == 1:
            return self.replicated()
        # rounded up: an uneven rest is padded
        weights, optimizer = -(-self.weights // n_gpus), -(-self.optimizer // n_gpus)
        gathered = self.gathered + (self.weights if accumulates else self.gathered)
        return Footprint(weights, weights, optimizer, gathered, self.activations, self.loss)


@dataclass(frozen=True)
class Shape:
    """A micro-batch."""

    n_rows: int
    row_len: int
    has_documents: bool = False
    """Whether tokens see only their own document."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.n_rows * self.row_len


def measure(config: ModelConfig, train: TrainConfig, shape: Shape, *, n_loops: int) -> Parts:
    """The parts of a run with micro-batches of `shape` and `n_loops` loops with gradient."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # loads sympy, which takes as long as half of torch

    # tensors with a shape and a type and no memory: only Python runs, whatever the size
    with FakeTensorMode():
        model = LoopedLM(config)
        # with the losses and without them: the difference is what the losses keep
        whole, of_model = (
            _of_rows(model, train, shape, n_loops=n_loops, with_loss=with_loss) for with_loss in (True, False)
        )
        # a chunk of logits at a time; an exit gate's loss needs the logits of all positions
        n_scored = CHUNK_ROWS if train.exit_gate is None else shape.n_tokens
        return Parts(
            weights=_bytes(own_tensors(model).values()),
            optimizer=_optimizer_bytes(model, train),
            gathered=_gathered(model),
            activations=of_model,
            loss=whole - of_model + CHUNK_BYTES * n_scored * config.n_targets,
        )


def _of_rows(model: LoopedLM, train: TrainConfig, shape: Shape, *, n_loops: int, with_loss: bool) -> int:
    """Bytes kept of a micro-batch. Rows are alike, so one row and two rows give the bytes of any number."""
    one, two = (kept(model, train, replace(shape, n_rows=n), n_loops=n_loops, with_loss=with_loss) for n in (1, 2))
    return one + (shape.n_rows - 1) * (two - one)


def kept(model: LoopedLM, train: TrainConfig, shape: Shape, *, n_loops: int, with_loss: bool = True) -> int:
    """Bytes that autograd keeps of a forward, without the model's own tensors; with `train.recompute`, at the moment
    when the backward pass has computed a loop again."""
    # the values do not matter, only the shapes
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
    # most is kept while one loop is computed again: the states between all loops, and one loop's activations, which
    # are what a forward of one loop keeps beyond the same forward with recomputation
    return saved(n_loops, recompute=True) + saved(1) - saved(1, recompute=True)


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module, *, bf16: bool = True) -> int:
    """Bytes of the distinct storages that autograd saves in `forward`, without the model's own; under autocast if
    `bf16`."""
    # weights are saved as well, and are counted apart
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # held, so that no later storage gets its address
        return tensor

    # autograd hands every tensor that it saves to `pack`; views of one storage count once
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        forward()
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own)


@contextmanager
def _as_on_a_gpu(model: LoopedLM) -> Iterator[None]:
    """Tensors without memory look like a CPU's, for which the model takes other paths, and they have no values to read.
    Here every position is scored, no loop is left out, and attention and experts run as on a GPU."""
    replaced: list[tuple[Any, str, Any]] = [
        (losses, "_scored", lambda batch, share: torch.arange(batch.targets.numel())),
        (model.exit, "is_settled", lambda halting: False),
        (layer_inputs, "MAX_WRITTEN_OUT", 0),
        (attention, "attend", _attend_on_gpu),
        (mla, "attend", _attend_on_gpu),
        (moe, "grouped", grouped_on_gpu),
    ]
    # patched by name for this one measurement: the model has no branch for tensors without memory
    with ExitStack() as stack:
        for holder, name, stand_in in replaced:
            stack.enter_context(patch.object(holder, name, stand_in))
        yield


def _attend_on_gpu(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, scale: float | None = None) -> Tensor:
    mixed: Tensor = _Attention.apply(q, k, v, None if mask.seen is None else mask.seen.to(q.dtype))
    return mixed


class _Attention(torch.autograd.Function):
    """What the fused kernels keep: inputs, the mask as a bias, the result, and the logarithm of a sum per query."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        mixed = q.new_empty(*q.shape[:-1], v.shape[-1])
        # of the scores, a number per query and head, by which the backward pass computes the weights again
        log_sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, bias, mixed, log_sums)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        raise AssertionError("there is nothing to go back through")


def _optimizer_bytes(model: LoopedLM, train: TrainConfig) -> int:
    """Bytes that the optimizers hold after a step, and those of the average."""
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    total = 0
    # one step on tensors without memory: each optimizer makes its state itself
    for optimizer in make_optimizers(model, train.optimizer):
        optimizer.step()
        total += _bytes(part for state in optimizer.state.values() for part in state.values())
    model.zero_grad(set_to_none=True)
    return total + (0 if train.ema is None else _bytes(own_tensors(model).values()))


def _gathered(model: LoopedLM) -> int:
    """Bytes of the weights that are whole at a time: the core, the largest other layer, and all that is no layer."""
    # FSDP gathers prelude and coda layers one by one, core, embedding and head all at once
    beside = [_size(block) for part in (model.prelude, model.coda) for block in part]
    core = _size(model.core)
    rest = _size(model) - core - sum(beside)
    return core + max(beside, default=0) + rest


def _size(module: nn.Module) -> int:
    return _bytes(module.parameters())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
