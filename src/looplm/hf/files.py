"""The files other systems write: found, read without running anything in them, and written back.

Pickles are read with torch's weights_only loader: tensors and plain containers, and for OpenMythos one stub class in
place of its config. Where a file carries no config, it is told from the shapes.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from looplm.checkpoint import CONFIG, MODEL, read_tensors, save_weights, write_text
from looplm.config import Config, to_yaml
from looplm.errors import CheckpointError, ConfigError
from looplm.hf import openmythos, osrt
from looplm.hf.convert import dump_foreign, load_foreign
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.reading import read_json

ORIGIN = "origin.json"
MYTHOS_MODULE = "open_mythos.main"
STATE_KEYS = ("model", "model_state_dict", "state_dict")


@dataclass(frozen=True)
class ForeignCheckpoint:
    """What a file holds."""

    state: dict[str, Tensor]
    config: dict[str, Any]
    """The original's own fields."""


class ImportedConfig(Config):
    """The config.yaml of an imported run: a model, no data and no training."""

    model: ModelConfig
    """The model."""


class MythosConfigStub:
    """Takes the place of open_mythos.main.MythosConfig in their pickles: fields, nothing else."""


def read_foreign(system: str, path: Path, *, config: Mapping[str, Any] | None = None) -> ForeignCheckpoint:
    """Read a checkpoint file or folder of `system`; fields given in `config` take precedence over the file's."""
    if not path.exists():
        raise CheckpointError(f"no checkpoint {str(path)!r}")
    file = _file(system, path)
    held: dict[str, Any] = dict(read_tensors(file)) if file.suffix == ".safetensors" else _unpickle(file)
    wrapped = [held[key] for key in STATE_KEYS if isinstance(held.get(key), Mapping)]
    found_in: Mapping[str, Any] = wrapped[0] if wrapped else held
    state = {name: tensor for name, tensor in found_in.items() if isinstance(tensor, Tensor) and tensor.numel()}
    if not state:
        raise CheckpointError(f"{file} holds no weights")
    found = _config(system, file, held, state)
    return ForeignCheckpoint(state, found | dict(config or {}))


def import_run(system: str, path: Path, *, out: Path, config: Mapping[str, Any] | None = None) -> LoopedLM:
    """Read a checkpoint of `system` into a run folder `out` that every other command takes."""
    if (out / CONFIG).exists():
        raise ConfigError(f"{str(out)!r} already holds a run; give another --out")
    foreign = read_foreign(system, path, config=config)
    model = load_foreign(system, foreign.state, foreign.config)
    out.mkdir(parents=True, exist_ok=True)
    save_weights(model, out / MODEL)
    write_text(out / ORIGIN, json.dumps({"system": system, "config": foreign.config}, indent=1) + "\n")
    write_text(out / CONFIG, to_yaml(ImportedConfig(model=model.config)))
    return model


def export_run(model: LoopedLM, run: Path, *, system: str, out: Path) -> Path:
    """Write a run back in the format of `system`: the file that the original reads. Returns its path."""
    origin = run / ORIGIN
    if not origin.is_file():
        raise CheckpointError(f"{str(run)!r} was not imported from another system, so it cannot be written as one")
    known = read_json(origin, error=CheckpointError)
    if not isinstance(known.get("system"), str) or not isinstance(known.get("config"), dict):
        raise CheckpointError(f"{origin} does not say which system a run came from; import it again")
    if known["system"] != system:
        raise CheckpointError(f"{str(run)!r} came from {known['system']}; export it --to {known['system']}")
    state = dump_foreign(system, model)
    out.mkdir(parents=True, exist_ok=True)
    if system == "nanochat":
        path = out / "model_000000.pt"
        torch.save(state, path)
        write_text(out / "meta_000000.json", json.dumps({"step": 0, "model_config": known["config"]}, indent=1) + "\n")
    elif system == "openmythos":
        path = out / "model.pt"
        beside = {"head.weight": state["embed.weight"], **openmythos.rope_buffers(known["config"])}
        _save_mythos(state | beside, known["config"], path)
    else:
        path = out / "model.pt"
        torch.save(state, path)
    save_file({name: tensor.clone() for name, tensor in state.items()}, out / "model.safetensors")
    return path


def _save_mythos(state: Mapping[str, Tensor], config: Mapping[str, Any], path: Path) -> None:
    """As OpenMythos saves: beside the weights an object of its config class, which is only named in the file. Pickle
    wants to see the class it names, so the stub stands in its module while it writes."""
    stub = type("MythosConfig", (), {"__module__": MYTHOS_MODULE})
    config_object = stub()
    config_object.__dict__.update(config)
    package, module = ModuleType(MYTHOS_MODULE.partition(".")[0]), ModuleType(MYTHOS_MODULE)
    module.MythosConfig = stub  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in (package.__name__, module.__name__)}
    sys.modules |= {package.__name__: package, module.__name__: module}
    try:
        torch.save({"model": dict(state), "cfg": config_object}, path)
    finally:
        for name, original in before.items():
            if original is None:
                del sys.modules[name]
            else:
                sys.modules[name] = original


def _file(system: str, path: Path) -> Path:
    """The file to read: `path`, or the newest of a folder."""
    if path.is_file():
        return path
    found = sorted(path.glob("model_*.pt")) if system == "nanochat" else sorted(path.glob("*.pt"))
    found = found or sorted(path.glob("*.safetensors"))
    if not found:
        raise CheckpointError(f"{str(path)!r} holds no {'model_*.pt' if system == 'nanochat' else '*.pt'} file")
    return found[-1]


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals([(MythosConfigStub, f"{MYTHOS_MODULE}.MythosConfig")]):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as weights ({reason}); it is cut short, or holds more than tensors"
        ) from None
    if not isinstance(held, dict):
        raise CheckpointError(f"{path} holds a {type(held).__name__}, not a dict of tensors")
    return held


def _config(system: str, file: Path, held: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    if system == "nanochat":
        meta = file.with_name(file.name.replace("model_", "meta_")).with_suffix(".json")
        if not meta.is_file():
            raise CheckpointError(f"{meta} is missing: nanochat keeps the model's config there")
        found = read_json(meta, error=CheckpointError).get("model_config")
        if not isinstance(found, dict):
            raise CheckpointError(f"{meta} has no mapping `model_config`, where nanochat keeps the model's config")
        return found
    if system == "openmythos":
        config = held.get("cfg")
        if isinstance(config, MythosConfigStub):
            return dict(vars(config))
        return dict(config) if isinstance(config, Mapping) else openmythos.config_of_shapes(state)
    return osrt.config_of_shapes(state)
