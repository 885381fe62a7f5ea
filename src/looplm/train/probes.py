"""What the loops do while a model trains, measured now and then on a batch of its data, without gradient.

Numbers are added to the run's records as `probe/...`; each warning is given once, when it first becomes true. Nothing
here changes what the next step does.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from looplm.data.pack import Batch
from looplm.eval.loops import BEYOND, diagnose, follow_states, held_out_loss
from looplm.model.block import ResidualAdapter
from looplm.model.compiler import uncompiled
from looplm.model.layer_inputs import Asides
from looplm.model.loop.inject import DiagonalInject, LTIInject
from looplm.model.loop.plan import LoopPlan
from looplm.model.looped import LoopedLM

# The least gain of the loops after the first, in nats, and the least relative change of the state by one loop.
IDLE = 0.01


@uncompiled()  # compiled layers would be compiled once more, for inference
def probe_loops(model: LoopedLM, batch: Batch, *, n_loops: int) -> dict[str, float]:
    """All probes of `model` on `batch`; `n_loops` is the depth that it trains at."""
    found: dict[str, float] = {}
    for count in sorted({1, 2, n_loops // 2, n_loops, 2 * n_loops, BEYOND * n_loops} - {0}):
        found[f"probe/loss_{count}"] = held_out_loss(model, [batch], n_loops=count)
    states = follow_states(model, [batch], n_loops=BEYOND * n_loops)
    for state in states:
        found[f"probe/state_rms_{state.loop}"] = state.norm
        if state.change is not None:
            found[f"probe/state_change_{state.loop}"] = state.change
    diagnosis = diagnose(states, trained=n_loops)
    if diagnosis is not None:
        found["probe/growth_beyond"] = diagnosis.growth
        found["probe/change_rate_beyond"] = diagnosis.rate
        found["probe/is_drifting"] = float(diagnosis.kind == "drifting")
    return found | _decays(model) | _adapters(model) | _router_loads(model, batch, n_loops=n_loops)


def worries(found: Mapping[str, float], *, n_loops: int) -> Iterator[tuple[str, str]]:
    """Warnings for whoever trains this model: a word for each, and a sentence with the mend."""
    if n_loops > 1:
        gain = found["probe/loss_1"] - found[f"probe/loss_{n_loops}"]
        changes = [value for name, value in found.items() if name.startswith("probe/state_change_")]
        if abs(gain) < IDLE or (changes and max(changes) < IDLE):
            yield (
                "collapse",
                f"the loops have collapsed: {n_loops} gain {gain:.3f} nats over one; raise the share of deep plans, or "
                "take an injection that brings the input back (model.inject.kind=diagonal)",
            )
    if found.get("probe/is_drifting"):
        yield (
            "drift",
            f"the state drifts beyond {n_loops} loops (its size changes {found['probe/growth_beyond']:.2f} times up to "
            f"{BEYOND * n_loops}): more loops than trained will break the model; model.inject.kind=diagonal is stable",
        )


def _decays(model: LoopedLM) -> dict[str, float]:
    """The spectrum of an injection's decay: smallest, median and largest."""
    if not isinstance(model.inject, DiagonalInject | LTIInject):
        return {}
    decay = model.inject.decay().detach()
    return {
        "probe/decay_min": float(decay.min()),
        "probe/decay_median": float(decay.median()),
        "probe/decay_max": float(decay.max()),
    }


def _adapters(model: LoopedLM) -> dict[str, float]:
    """Mean absolute cosine between the corrections of different loops, beside that of random vectors of that size:
    near the baseline the loops differ, near 1 they are the same."""
    similarities, baselines = [], []
    for module in model.modules():
        if not isinstance(module, ResidualAdapter):
            continue
        vectors = (module.a.detach().float() @ module.b.detach().float()).flatten(1)
        if len(vectors) < 2 or not vectors.any():
            continue
        similarities.append(_mean_cosine(vectors))
        # products of thin matrices have fewer directions than entries: chance is drawn, not 1 / sqrt(n_entries)
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(part.shape, generator=generator) for part in (module.a, module.b))
        baselines.append(_mean_cosine((a @ b).flatten(1)))
    if not similarities:
        return {}
    return {
        "probe/adapter_similarity": sum(similarities) / len(similarities),
        "probe/adapter_similarity_by_chance": sum(baselines) / len(baselines),
    }


def _mean_cosine(vectors: Tensor) -> float:
    """Mean absolute cosine between different rows."""
    unit = torch.nn.functional.normalize(vectors, dim=1)
    cosines = (unit @ unit.T).abs()
    n = len(vectors)
    return float((cosines.sum() - cosines.diagonal().sum()) / (n * (n - 1)))


@torch.inference_mode()
def _router_loads(model: LoopedLM, batch: Batch, *, n_loops: int) -> dict[str, float]:
    """By loop, the load of the busiest expert over the mean load, averaged over the core layers with experts."""
    core_layers = {block.place.layer_idx for block in model.blocks() if block.moe is not None} & {
        model.config.n_prelude + index for index in range(model.config.n_core)
    }
    if not core_layers:
        return {}
    asides = Asides()
    model.hidden(batch.ids, plan=LoopPlan(n_loops), documents=batch.documents, asides=asides)
    loads = [load for layer_idx, load in asides.loads if layer_idx in core_layers]
    found = {}
    for loop in range(math.ceil(len(loads) / len(core_layers))):
        own = loads[loop * len(core_layers) : (loop + 1) * len(core_layers)]
        found[f"probe/max_load_{loop + 1}"] = sum(float(load.max() / load.float().mean()) for load in own) / len(own)
    return found
