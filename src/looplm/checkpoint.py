"""Checkpoints: a folder of safetensors and JSON, written beside its place and renamed into it, the marker last.

    RUN/config.yaml                       the resolved config, itself a valid input
    RUN/checkpoints/step-00001200/        model.safetensors  training.safetensors  state.json  COMPLETE
                                          average.safetensors, where weights are averaged: what is read for inference
A bare `RUN/model.safetensors` beside config.yaml (as in the built-in reasoner) is a run without training state.
Nothing is ever unpickled.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from looplm.config import load_yaml, parse
from looplm.errors import CheckpointError, TrainingError
from looplm.files import write_whole
from looplm.model.looped import LoopedLM, ModelConfig

MODEL, AVERAGE, TRAINING, STATE, MARKER, CONFIG = (
    "model.safetensors",
    "average.safetensors",
    "training.safetensors",
    "state.json",
    "COMPLETE",
    "config.yaml",
)
BUILTIN = "builtin:"


@dataclass
class LoadedRun:
    """A run folder read back."""

    model: LoopedLM
    config: dict[str, Any]
    """The whole resolved config, as plain data."""
    path: Path
    """Where the weights were read."""


def load(run: str | Path) -> LoopedLM:
    """The model of a run folder, or of `builtin:reasoner`: newest complete checkpoint, fp32, ready for inference."""
    return load_run(run).model


def load_run(run: str | Path) -> LoadedRun:
    """As `load`, with the run's config."""
    folder = run_folder(run)
    weights = weights_folder(folder)
    config = load_yaml(folder / CONFIG)
    model = LoopedLM.on("cpu", run_model_config(folder), draw=False)
    with _naming_the_one_before(folder, weights):
        load_weights(model, weights / (AVERAGE if (weights / AVERAGE).is_file() else MODEL))
    return LoadedRun(model.eval(), config, weights)


def run_model_config(run: str | Path) -> ModelConfig:
    """The model's config of a run folder, or of `builtin:reasoner`."""
    path = run_folder(run) / CONFIG
    section = load_yaml(path).get("model")
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} has no `model:` section; it is not the config of a run")
    return parse(ModelConfig, section, source=str(path))


def run_folder(run: str | Path) -> Path:
    """The folder of a run by path or by `builtin:NAME`."""
    text = str(run)
    if text.startswith(BUILTIN):
        root = Path(str(resources.files("looplm"))) / "builtin"
        names = sorted(path.parent.name for path in root.glob(f"*/{MODEL}"))
        if text.removeprefix(BUILTIN) not in names:
            raise CheckpointError(f"no built-in model {text!r}; there is {', '.join(BUILTIN + name for name in names)}")
        return root / text.removeprefix(BUILTIN)
    folder = Path(run)
    if not folder.is_dir():
        raise CheckpointError(f"no run folder {text!r}; give a folder that `looplm train` made, or builtin:reasoner")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{text!r} holds no {CONFIG}; give a folder that `looplm train` made")
    return folder


def weights_folder(folder: Path) -> Path:
    """Where a run's weights are: its newest checkpoint, or the folder itself for weights without training state."""
    return folder if (folder / MODEL).is_file() else latest_checkpoint(folder)


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. A folder without its marker was cut short and does not count."""
    return sorted(path.parent for path in folder.glob(f"checkpoints/step-*/{MARKER}"))


def latest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run."""
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"{str(folder)!r} holds no complete checkpoint; the run was stopped before its first one")
    return found[-1]


def load_weights(model: LoopedLM, path: Path) -> None:
    """Read weights into `model`, in the model's own type; missing, extra and misshapen keys are listed in one error."""
    tensors = _read_weights(model, path)
    for name, tensor in own_tensors(model).items():
        tensor.copy_(tensors[name])


def _read_weights(model: LoopedLM, path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    problems = mismatches({name: tensor.shape for name, tensor in own_tensors(model).items()}, tensors)
    if problems:
        raise CheckpointError(f"{path} does not fit the model of its config: {'; '.join(problems)}")
    return tensors


def own_tensors(model: LoopedLM) -> dict[str, Tensor]:
    """The model's tensors by name, tied ones once."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied_names(model)}


def mismatches(expected: Mapping[str, torch.Size], found: Mapping[str, Tensor]) -> list[str]:
    """Missing, unexpected and misshapen tensors, a phrase each."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} is {tuple(found[name].shape)}, not {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    return problems


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file, or one clear error."""
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is cut short or not a safetensors file ({error}); restore or retrain it"
        ) from None


def save_weights(model: LoopedLM, path: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the weights, tied ones once, optionally in a smaller type."""
    save_tensors({name: t.detach().to(dtype or t.dtype) for name, t in own_tensors(model).items()}, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def tied_names(model: LoopedLM) -> set[str]:
    """Names in the state dict that repeat another's tensor."""
    return {"head.weight"} if model.config.tied_head else set()


def save_checkpoint(
    folder: Path,
    *,
    step: int,
    model: LoopedLM,
    optimizers: list[Optimizer],
    state: dict[str, Any],
    keep: int,
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write one complete checkpoint, with averaged weights if there are any, and delete all but the newest `keep`. A
    failure leaves the earlier ones intact."""
    final = folder / "checkpoints" / f"step-{step:08d}"
    if (final / MARKER).exists():
        return final
    temporary = final.with_name(final.name + ".partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_weights(model, temporary / MODEL)
        if average is not None:
            save_tensors(average, temporary / AVERAGE)
        training = optimizer_tensors(optimizers) | {"torch_rng": torch.get_rng_state()}
        save_file(training, temporary / TRAINING)
        (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in temporary.iterdir():
            _sync(path)
        temporary.rename(final)
        (final / MARKER).touch()
        _sync(final)
        _sync(final.parent)  # the rename itself, before anything older is deleted
        _remove_old(folder, keep=keep)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        left = checkpoints(folder)
        kept = f"the last one, {left[-1]}, is intact" if left else "there is no earlier one"
        raise TrainingError(
            f"checkpoint {final} could not be written ({error}); {kept}. Free space and resume."
        ) from None
    return final


def read_state(folder: Path) -> dict[str, Any]:
    """The state saved with the newest complete checkpoint: what a resume needs to know before it builds anything."""
    path = latest_checkpoint(folder)
    with _naming_the_one_before(folder, path):
        try:
            state = json.loads((path / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path / STATE} cannot be read ({error})") from None
        if not isinstance(state, dict):
            raise CheckpointError(f"{path / STATE} is not a mapping")
    return state


def load_checkpoint(folder: Path, *, model: LoopedLM, optimizers: list[Optimizer]) -> None:
    """Restore the newest complete checkpoint into model and optimizers."""
    path = latest_checkpoint(folder)
    with _naming_the_one_before(folder, path):
        load_weights(model, path / MODEL)
        training = read_tensors(path / TRAINING)
        if "torch_rng" not in training:
            raise CheckpointError(f"{path / TRAINING} holds no generator state; it is not a training checkpoint")
        torch.set_rng_state(training.pop("torch_rng"))
        restore_optimizers(optimizers, training, source=path / TRAINING)


def read_average(folder: Path, *, model: LoopedLM) -> dict[str, Tensor]:
    """The averaged weights of the newest complete checkpoint, by the names of `own_tensors`."""
    path = latest_checkpoint(folder)
    with _naming_the_one_before(folder, path):
        return _read_weights(model, path / AVERAGE)


def optimizer_tensors(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """All optimizer state as named tensors: `{optimizer}.{parameter}.{name}`. Rates are recomputed from the config."""
    return {
        f"{number}.{index}.{name}": value.contiguous()
        for number, optimizer in enumerate(optimizers)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_optimizers(optimizers: list[Optimizer], tensors: dict[str, Tensor], *, source: Path) -> None:
    """The inverse of `optimizer_tensors`."""
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for key, tensor in tensors.items():
        number, index, name = key.split(".", 2)
        if int(number) >= len(optimizers):
            raise CheckpointError(f"{source} was written by other optimizers than the config names")
        states[int(number)].setdefault(int(index), {})[name] = tensor
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def write_text(path: Path, text: str) -> None:
    """Replace a small file whole or not at all."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written ({error.strerror}); what was there before is intact"
        ) from None


def _remove_old(folder: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and whatever was left half written."""
    complete = checkpoints(folder)
    for old in complete[:-keep]:
        (old / MARKER).unlink()
    for path in (folder / "checkpoints").glob("step-*"):
        if path not in complete[-keep:]:
            shutil.rmtree(path)


@contextmanager
def _naming_the_one_before(folder: Path, path: Path) -> Iterator[None]:
    """Add to an error about a damaged checkpoint which earlier one can take its place."""
    try:
        yield
    except CheckpointError as error:
        others = [other for other in checkpoints(folder) if other != path]
        hint = f" An earlier checkpoint is there: delete {path} to go back to {others[-1].name}." if others else ""
        raise CheckpointError(f"{error}{hint}") from None


def _sync(path: Path) -> None:
    """Make a file or folder durable before anything that relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
