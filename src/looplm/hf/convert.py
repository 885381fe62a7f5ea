"""Import and export of other systems' weights, tensor by tensor."""

import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from looplm.config import did_you_mean
from looplm.errors import CheckpointError, ConfigError
from looplm.hf import nanochat, openmythos, osrt
from looplm.hf.names import unwrapped
from looplm.hf.original import OriginalConfig
from looplm.hf.rules import Rule, dump_by_rules, load_by_rules, misfits
from looplm.model.ffn import ParallelConfig
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.model.meta import without_memory
from looplm.model.moe import MoEConfig

logger = logging.getLogger(__name__)

SYSTEMS: dict[str, ModuleType] = {"nanochat": nanochat, "openmythos": openmythos, "osrt": osrt}


def load_foreign(
    system: str,
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    say: Callable[[str], object] = logger.warning,
) -> LoopedLM:
    """The model of another system with its weights, in fp32. `config` has the original's field names. A field left out
    takes the original's default, and `say` is called with a line that lists those; fields that decide nothing are
    ignored. What torch.compile, DDP and FSDP put into names is taken off.

    Raises:
        ConfigError: an unknown system; a field of a wrong type or out of range; fields that are missing and whose
            defaults do not fit the weights.
        CheckpointError: tensors that are missing, unexpected or misshapen.
    """
    table = table_of(system)
    state = unwrapped(checked_state(system, state_dict))
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        raise ConfigError(f"the {system} config must be a mapping of field names to values, not {config!r:.60}")
    original: OriginalConfig = table.original_config(config, state)
    try:
        ours: ModelConfig = table.model_config(original)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"the {system} config is not possible: {reason}") from None
    state = table.clean(state, ours)
    rules, problems = _matched(table, ours, state)
    suspects = [name for name in original.taken if name not in original.shapeless]
    if problems and suspects:
        raise ConfigError(
            f"the {system} config lacks {', '.join(map(repr, suspects))}, and with the original's defaults "
            f"({original.say_taken(suspects)}) it does not fit the weights: {problems}. Give the fields that belong to "
            "them."
        )
    if problems:
        raise CheckpointError(
            f"these weights are not of the {system} model that the config describes: {problems}. Give the config that "
            "belongs to them."
        )
    if original.taken:
        say(f"the {system} config leaves out fields: {original.say_taken(original.taken)} are the original's defaults")
    model = LoopedLM.on("cpu", ours, draw=False)
    load_by_rules(model, rules, state)
    return model.eval()


def _matched(table: ModuleType, ours: ModelConfig, state: Mapping[str, Tensor]) -> tuple[list[Rule], str]:
    """The rules of a model, and in one line what does not fit the weights."""
    # every layer, expert and loop with an adapter has its own tensors: a model with more of them is not built
    ffn = ours.core_ffn or ours.block.ffn
    moe = ffn.moe if isinstance(ffn, ParallelConfig) else ffn
    n_experts = moe.n_experts if isinstance(moe, MoEConfig) else 0
    n_parts = ours.n_layers + n_experts + (ours.n_core * ours.n_loops if ours.adapter is not None else 0)
    if n_parts > len(state):
        return (
            [],
            f"the config has {n_parts:,} layers, experts and adapters, and the weights are {len(state):,} tensors",
        )
    rules: list[Rule] = table.rules(ours)
    try:
        with without_memory():
            model = LoopedLM(ours)
    except RuntimeError:  # not even its sizes can be written down
        return rules, "it has sizes beyond what a tensor can have"
    return rules, misfits(model, rules, state)


def dump_foreign(system: str, model: LoopedLM, *, dtypes: Mapping[str, torch.dtype] | None = None) -> dict[str, Tensor]:
    """The weights of a model that `load_foreign` made, under the other system's names. With `dtypes`, every tensor has
    the type given for its name, fp32 where none is; without, the model's own."""
    state = dump_by_rules(model, table_of(system).rules(model.config))
    if dtypes is None:
        return state
    return {name: tensor.to(dtypes.get(name, torch.float32)) for name, tensor in state.items()}


def table_of(system: str) -> ModuleType:
    """What is known of a system.

    Raises:
        ConfigError: nothing is.
    """
    if not isinstance(system, str) or system not in SYSTEMS:
        close = did_you_mean(system, SYSTEMS) if isinstance(system, str) else "."
        raise ConfigError(f"unknown system {system!r}{close} Systems: {', '.join(SYSTEMS)}.")
    return SYSTEMS[system]


def checked_state(system: str, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """`state`, if it is one: names and tensors of floating-point numbers, but for tables of rotations."""
    if not isinstance(state, Mapping):
        raise CheckpointError(f"the {system} state dict must be a mapping of names to tensors, not {state!r:.60}")
    if not state:
        raise CheckpointError(f"the {system} state dict holds no tensors")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"the {system} state dict holds {name!r:.60}: {tensor!r:.60}, which is no tensor")
        if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.layout != torch.strided or tensor.is_meta:
            kind = "has no numbers" if tensor.is_meta else f"is {str(tensor.dtype).removeprefix('torch.')}"
            raise CheckpointError(f"{name} of the {system} state dict {kind}; weights are plain floating-point tensors")
    return state
