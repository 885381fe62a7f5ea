"""Import and export of other systems' weights, tensor by tensor."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor

from looplm.config import did_you_mean
from looplm.errors import CheckpointError, ConfigError
from looplm.hf import nanochat, openmythos, osrt
from looplm.hf.rules import dump_by_rules, load_by_rules
from looplm.model.looped import LoopedLM

SYSTEMS: dict[str, ModuleType] = {"nanochat": nanochat, "openmythos": openmythos, "osrt": osrt}


def load_foreign(system: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> LoopedLM:
    """The model of another system with its weights. `config` has the original's field names; others are ignored."""
    if system not in SYSTEMS:
        raise ConfigError(f"unknown system {system!r}{did_you_mean(system, SYSTEMS)} Systems: {', '.join(SYSTEMS)}.")
    table = SYSTEMS[system]
    if not state_dict:
        raise CheckpointError(f"the {system} state dict holds no tensors")
    try:
        ours = table.model_config(config)
    except KeyError as error:
        raise ConfigError(f"the {system} config lacks {error}; give all of the original's fields") from None
    except ValueError as error:
        raise ConfigError(f"the {system} config is not possible: {error}") from None
    model = LoopedLM.on("cpu", ours, draw=False)
    load_by_rules(model, table.rules(ours), table.clean(state_dict, ours), system=system)
    return model.eval()


def dump_foreign(system: str, model: LoopedLM) -> dict[str, Tensor]:
    """The weights of a model that `load_foreign` made, under the other system's names."""
    return dump_by_rules(model, SYSTEMS[system].rules(model.config))
