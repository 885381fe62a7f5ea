"""The files other systems write: found, read without running anything in them, and written back.

Pickles are read with torch's weights_only loader: tensors and plain containers, and for OpenMythos one stub class
instead of its config. A file's config is the one it carries, or that of a `config.json` beside it; where there is none
it is told from the shapes. What a run keeps of the original for the way back is in its `origin.json`.
"""

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from looplm.checkpoint import CONFIG, MARKER, MODEL, new_folder, read_tensors, save_tensors, save_weights, write_text
from looplm.checksums import find_damage
from looplm.config import Config, to_yaml
from looplm.errors import CheckpointError, ConfigError, FolderError
from looplm.files import natural_key
from looplm.hf import openmythos, osrt
from looplm.hf.convert import checked_state, dump_foreign, load_foreign, table_of
from looplm.hf.names import unwrapped
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.reading import parse_json, read_json

logger = logging.getLogger(__name__)

ORIGIN = "origin.json"
EXACT = "origin.safetensors"  # tensors with numbers that fp32 has not, as they were
HF_CONFIG = "config.json"
MYTHOS_MODULE = "open_mythos.main"
STATE_KEYS = ("model", "model_state_dict", "state_dict")
STEP = re.compile(r"(?:step|model)[_-]?(\d+)$")  # at the end of a file's name, without its suffix


@dataclass(frozen=True)
class ForeignCheckpoint:
    """What a file holds."""

    state: dict[str, Tensor]
    """By the names of the model itself, whatever it was wrapped in."""
    config: dict[str, Any]
    """The original's own fields."""
    name: str = "model"
    """The file's, without suffix."""
    step: int | None = None
    """Training steps, if the file or its name says so."""
    meta: dict[str, Any] = field(default_factory=dict)
    """nanochat: the other things that its meta_*.json says."""


class ImportedConfig(Config):
    """The config.yaml of an imported run: a model, no data and no training."""

    model: ModelConfig
    """The model."""


class MythosConfigStub:
    """Stands for open_mythos.main.MythosConfig in their pickles: fields, nothing else."""


def read_foreign(system: str, path: Path, *, config: Mapping[str, Any] | None = None) -> ForeignCheckpoint:
    """Read a checkpoint file or the newest one of a folder; fields given in `config` take precedence over the file's.

    Raises:
        ConfigError: an unknown system.
        CheckpointError: there is no such file, or it holds something else.
    """
    table_of(system)
    if not path.exists():
        raise CheckpointError(f"no checkpoint {str(path)!r}")
    file = _file(system, path)
    _check_written(file)
    held: dict[str, Any] = dict(read_tensors(file)) if file.suffix == ".safetensors" else _unpickle(file)
    wrapped = [held[key] for key in STATE_KEYS if isinstance(held.get(key), Mapping)]
    found_in: Mapping[str, Any] = wrapped[0] if wrapped else held
    tensors = {str(name): tensor for name, tensor in found_in.items() if isinstance(tensor, Tensor) and tensor.numel()}
    if not tensors:
        raise CheckpointError(f"{file} holds no weights")
    try:
        state = unwrapped(checked_state(system, tensors))
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    described = _metadata(file) if file.suffix == ".safetensors" else {}
    meta = _nanochat_meta(file) if system == "nanochat" else {}
    given = dict(config or {})
    found = _config(system, file, held | described | meta, state, given=given)
    step = _step(file.stem, held | described | meta)
    return ForeignCheckpoint(state, found | given, name=file.stem, step=step, meta=meta)


def import_run(
    system: str,
    path: Path,
    *,
    out: Path,
    config: Mapping[str, Any] | None = None,
    say: Callable[[str], object] = logger.warning,
) -> LoopedLM:
    """Read a checkpoint of `system` into a run folder `out` that every other command takes. `say` is called with a line
    about the defaults that fields of the config took.

    Raises:
        ConfigError: an unknown system, a config that is not possible, or `out` holds a run.
        CheckpointError: no weights of the system's model.
        FolderError: `out` holds something else, or cannot be written into.
    """
    table_of(system)
    if (out / CONFIG).exists():
        raise ConfigError(f"{str(out)!r} already holds a run; give another --out")
    with new_folder(out) as place:
        foreign = read_foreign(system, path, config=config)
        model = load_foreign(system, foreign.state, foreign.config, say=say)
        save_weights(model, place / MODEL)
        inexact = {name: tensor for name, tensor in foreign.state.items() if not _is_exact(tensor)}
        if inexact:
            save_tensors(inexact, place / EXACT)
        origin = {
            "system": system,
            "config": foreign.config,
            "name": foreign.name,
            "step": foreign.step,
            "dtypes": {name: _dtype_name(t) for name, t in foreign.state.items() if t.dtype != torch.float32},
            "meta": foreign.meta,
        }
        try:
            text = json.dumps(origin, indent=1)
        except (TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"the config in {str(path)!r} is not of plain values ({error})") from None
        write_text(place / ORIGIN, text + "\n")
        write_text(place / CONFIG, to_yaml(ImportedConfig(model=model.config)))
    return model


def export_run(model: LoopedLM, run: Path, *, system: str, out: Path) -> Path:
    """Write a run back in the format of `system`: the file that the original reads. Returns its path. Types and the
    number of steps are those of the file that was imported.

    Raises:
        ConfigError: an unknown system.
        CheckpointError: the run was not imported from this system.
        FolderError: `out` holds something, or cannot be written into.
    """
    table_of(system)
    known = _read_origin(run, system=system)
    dtypes = {name: _dtype(run, text) for name, text in known["dtypes"].items()} if "dtypes" in known else None
    state = dump_foreign(system, model, dtypes=dtypes)
    if (run / EXACT).is_file():
        state |= _unchanged(read_tensors(run / EXACT), state)
    step, config = known.get("step"), known["config"]
    name = _export_name(system, str(known.get("name", MODEL)), step)
    with new_folder(out) as place:
        if system == "openmythos":
            beside = {"head.weight": state["embed.weight"], **openmythos.rope_buffers(config)}
            counted = {} if step is None else {"step": step}
            _save_mythos(state | beside, config, place / f"{name}.pt", beside=counted)
        else:
            _save(state, place / f"{name}.pt")
        if system == "nanochat":
            meta = {"step": step or 0} | known.get("meta", {}) | {"model_config": config}
            path = place / f"{name.replace('model_', 'meta_')}.json"
            write_text(path, json.dumps(meta, indent=1) + "\n")
        elif system == "osrt":
            write_text(place / HF_CONFIG, json.dumps(config, indent=1) + "\n")
        described = {"config": json.dumps(config)} | ({} if step is None else {"step": str(step)})
        save_tensors({name: tensor.clone() for name, tensor in state.items()}, place / MODEL, metadata=described)
    return out / f"{name}.pt"


def _read_origin(run: Path, *, system: str) -> dict[str, Any]:
    """What the run's `origin.json` says, its kinds of values checked."""
    origin = run / ORIGIN
    if not origin.is_file():
        raise CheckpointError(f"{str(run)!r} was not imported from another system, so it cannot be written as one")
    known = read_json(origin, error=CheckpointError)
    kinds: dict[str, Any] = {"dtypes": dict, "meta": dict, "name": str, "step": int | None}
    is_whole = isinstance(known.get("system"), str) and isinstance(known.get("config"), dict)
    if not is_whole or any(key in known and not isinstance(known[key], kind) for key, kind in kinds.items()):
        raise CheckpointError(f"{origin} does not say what a run was made of; import it again")
    if known["system"] != system:
        raise CheckpointError(f"{str(run)!r} came from {known['system']}; export it --to {known['system']}")
    return known


def _export_name(system: str, name: str, step: int | None) -> str:
    """The file's name without suffix: as it was, if that says the step."""
    if system == "nanochat":
        return f"model_{step or 0:06d}"
    if STEP.search(name) and Path(name).name == name:
        return name
    return "model" if step is None else f"step_{step:07d}"


def _is_exact(tensor: Tensor) -> bool:
    """Whether fp32 has all its numbers."""
    return tensor.dtype.itemsize <= 4 or tensor.is_complex() or torch.equal(tensor.float().to(tensor.dtype), tensor)


def _unchanged(exact: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those tensors that the run still has, as fp32 has them."""
    shared = {name: tensor for name, tensor in exact.items() if name in state and tensor.shape == state[name].shape}
    return {name: t for name, t in shared.items() if _same(t.float(), state[name].float())}


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _dtype(run: Path, name: object) -> torch.dtype:
    found = getattr(torch, str(name), None)
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{run / ORIGIN} names the type {name!r}, which torch has not; import the run again")
    return found


def _save(held: Mapping[str, Any], path: Path) -> None:
    try:
        torch.save(dict(held), path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise FolderError(f"{path.name} could not be written ({str(error).splitlines()[0]})") from None


def _save_mythos(
    state: Mapping[str, Tensor], config: Mapping[str, Any], path: Path, *, beside: Mapping[str, Any]
) -> None:
    """As OpenMythos saves: the weights and an object of its config class, of which the file holds only the name. Pickle
    looks the class up by that name, so the stub stands in its module while it writes."""
    stub = type("MythosConfig", (), {"__module__": MYTHOS_MODULE})
    config_object = stub()
    config_object.__dict__.update(config)
    package, module = ModuleType(MYTHOS_MODULE.partition(".")[0]), ModuleType(MYTHOS_MODULE)
    module.MythosConfig = stub  # type: ignore[attr-defined]
    before = {name: sys.modules.get(name) for name in (package.__name__, module.__name__)}
    sys.modules |= {package.__name__: package, module.__name__: module}
    try:
        _save({**beside, "model": dict(state), "cfg": config_object}, path)
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
    pattern = "model_*.pt" if system == "nanochat" else "*.pt"
    found = [*path.glob(pattern)] or [*path.glob("*.safetensors")]
    if not found:
        raise CheckpointError(f"{str(path)!r} holds no {pattern} file")
    return max(found, key=lambda file: natural_key(file.name))


def _check_written(file: Path) -> None:
    """Refuse a file of an export of ours that is no longer what was written."""
    marker = file.with_name(MARKER)
    meta = _meta_path(file)
    damage = find_damage(marker, only=[file.name, meta.name]) if marker.is_file() else None
    if damage is not None:
        raise CheckpointError(f"{damage}; export it again")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        stub = (MythosConfigStub, f"{MYTHOS_MODULE}.MythosConfig")
        with torch.serialization.safe_globals([stub]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other versions
            held = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # whatever the bytes lead the unpickler to
        # torch's own message advises to run what is in the file; of it only the name of the thing is kept
        named = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        reason = f"it holds {named[1]}, and only tensors are read" if named else "it is cut short, or holds no tensors"
        raise CheckpointError(f"{path} cannot be read as weights: {reason}") from None
    if not isinstance(held, dict):
        raise CheckpointError(f"{path} holds a {type(held).__name__}, not a dict of tensors")
    return held


def _metadata(file: Path) -> dict[str, Any]:
    """Config and step that a safetensors file of ours carries."""
    try:
        with safe_open(file, "pt") as opened:
            held = opened.metadata() or {}
        config = parse_json(held["config"]) if "config" in held else None
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} holds a config that cannot be read ({error})") from None
    found = {"cfg": config, "model_config": config} if isinstance(config, dict) else {}
    return found | ({"step": int(held["step"])} if held.get("step", "").isdecimal() else {})


def _meta_path(file: Path) -> Path:
    """Where nanochat keeps what belongs to a model_*.pt."""
    return file.with_name(file.name.replace("model_", "meta_")).with_suffix(".json")


def _nanochat_meta(file: Path) -> dict[str, Any]:
    path = _meta_path(file)
    if not path.is_file():
        return {}
    meta = read_json(path, error=CheckpointError)
    if not isinstance(meta.get("model_config"), dict):
        raise CheckpointError(f"{path} has no mapping `model_config`, where nanochat keeps the model's config")
    return meta


def _config(
    system: str, file: Path, held: Mapping[str, Any], state: Mapping[str, Tensor], *, given: Mapping[str, Any]
) -> dict[str, Any]:
    """The original's fields, as far as the file and what stands beside it say."""
    own = held.get("model_config" if system == "nanochat" else "cfg")
    if isinstance(own, MythosConfigStub):
        return dict(vars(own))
    if isinstance(own, Mapping):
        return dict(own)
    beside = file.with_name(HF_CONFIG)
    found = read_json(beside, error=CheckpointError) if beside.is_file() else {}
    if system == "nanochat":
        if not found and not given:
            raise CheckpointError(f"{_meta_path(file)} is missing: nanochat keeps the model's config there")
        return found
    try:
        if system == "openmythos":
            # a config that was found or given says what a table of rotations would have told
            told = openmythos.config_of_shapes(state) if not (found or given) or "freqs_cis" in state else {}
        else:
            width = (found | dict(given)).get("head_dim")
            told = osrt.config_of_shapes(state, **({"head_dim": width} if type(width) is int and width > 0 else {}))
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{file} holds no weights of {system}: its tensors do not tell a config ({error})"
        ) from None
    return told | found


def _step(name: str, held: Mapping[str, Any]) -> int | None:
    """Training steps, by what is held beside the weights or by the end of the file's name."""
    held_step, named = held.get("step"), STEP.search(name)
    if type(held_step) is int and held_step >= 0:
        return held_step
    return int(named[1]) if named is not None and len(named[1]) < 16 else None
