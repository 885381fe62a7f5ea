"""Decoding, compiled: what a cached forward of one token per text runs, as one step, or as parts where loops may be
left out or are many.

A step is compiled as a graph of tensors and called without torch.compile's checks. Those look up every weight before
each call, though none can change: a quarter of a small model's time.

Shapes: B texts, D width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from looplm.model.cache import KVCache, Slot
from looplm.model.compiler import TURNS, compile_graph, only_arguments
from looplm.model.layer_inputs import Asides, LayerInputs
from looplm.model.loop.plan import LoopPlan
from looplm.model.partial import Ran

if TYPE_CHECKING:
    from looplm.model.looped import LoopedLM

# Forms of a step, or of one part, by batch size, capacity and number of loops; beyond, not compiled. (All parts of a
# process together: 256, dynamo's accumulated_recompile_limit.)
MAX_COMPILED = 64


class Step(nn.Module):
    """A cached forward of one token per text, of nothing but tensors."""

    def __init__(self, model: "LoopedLM", *, capacity: int, n_loops: int) -> None:
        super().__init__()
        self.model, self.capacity, self.plan = model, capacity, LoopPlan(n_loops)

    def forward(self, ids: Tensor, positions: Tensor, before: Tensor, *slots: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (B, 1, D) and logits (B, 1, V) of ids (B, 1)."""
        pairs = zip(slots[::2], slots[1::2], strict=True)
        hidden = self.model.run(
            ids,
            parts=self.model,
            plan=self.plan,
            cache=KVCache([Slot(*pair) for pair in pairs], capacity=self.capacity),
            positions=positions,
            n_keys=self.capacity,
            documents=None,
            before=before,
            asides=None,
            states=None,
        )
        return hidden, self.model.logits(hidden)


class CompiledSteps:
    """`Step` for every batch size, capacity and number of loops, each compiled when it is first asked for."""

    def __init__(self, model: "LoopedLM") -> None:
        self.model = model
        self.compiled: dict[tuple[int, int, int], Callable[..., Sequence[Tensor]]] = {}

    def __call__(
        self, ids: Tensor, *, n_loops: int, cache: KVCache, positions: Tensor, before: Tensor
    ) -> Sequence[Tensor]:
        """What `Step` returns."""
        tensors = [each.long().contiguous() for each in (ids, positions, before)]
        tensors += [tensor for slot in cache.slots for tensor in (slot.keys, slot.values)]
        key = len(ids), cache.capacity, n_loops
        if key not in self.compiled:
            step = Step(self.model, capacity=cache.capacity, n_loops=n_loops)
            with TURNS.compilation():
                if key not in self.compiled:  # by another thread meanwhile
                    if len(self.compiled) == MAX_COMPILED:
                        return step(*tensors)
                    self.compiled[key] = compile_graph(step, tensors)
        return self.compiled[key](*tensors)


@dataclass(frozen=True)
class CompiledParts:
    """A model's step, and its methods of the same names as the others, compiled."""

    step: CompiledSteps
    enter: Callable[..., tuple[Tensor, LayerInputs]]
    loop_and_exit: Callable[..., tuple[Tensor, Asides | None]]
    leave: Callable[..., Tensor]
    begin: Callable[..., Ran]
    go_on: Callable[..., Ran]

    @classmethod
    def of(cls, model: "LoopedLM") -> "CompiledParts":
        """All of them, each still to be compiled at its first call."""
        on_cpu = model.embed.weight.device.type == "cpu"

        def compiled(part: Callable[..., Any], **options: Any) -> Callable[..., Any]:
            options["guard_filter_fn"] = only_arguments
            # isolated, or what was compiled for one model would serve another of like shapes
            call = torch.compile(  # type: ignore[call-overload]
                part, dynamic=False, options=options, isolate_recompiles=True, recompile_limit=MAX_COMPILED
            )
            # only torch knows which calls compile, so each has the process to itself
            return TURNS.compilation()(call)

        parts = (compiled(part) for part in (model.enter, model.loop_and_exit, model.leave))
        whole = (compiled(part, cpp_wrapper=on_cpu) for part in (model.begin, model.go_on))
        return cls(CompiledSteps(model), *parts, *whole)
