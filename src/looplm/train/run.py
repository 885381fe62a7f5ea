"""From a run config to a trained run folder: the function behind `looplm train`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from looplm.checkpoint import CONFIG, checkpoints, run_folder
from looplm.config import Config, apply_overrides, load_preset, load_yaml, parse, to_yaml
from looplm.data.sources import DataConfig, make_source
from looplm.errors import ConfigError, TrainingError
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.train.fit import FitResult, Observer, TrainConfig, fit


class RunConfig(Config):
    """Everything a run is."""

    model: ModelConfig
    """The model."""
    data: DataConfig
    """What it learns from."""
    train: TrainConfig
    """How it learns."""


def resolve_run(recipe: str, *, overrides: Iterable[str] = (), model: str | None = None) -> RunConfig:
    """The config of a run preset or YAML file with `a.b=c` overrides; `model` names another model preset."""
    data = load_preset("run", recipe)
    if model is not None:
        data["model"] = model
    return parse(RunConfig, apply_overrides(_with_model(data), overrides), source=f"run {recipe!r}")


def start_run(config: RunConfig, out: Path, *, observers: tuple[Observer, ...] = ()) -> FitResult:
    """Train in a new folder `out`."""
    if checkpoints(out):
        raise ConfigError(f"{str(out)!r} already holds a run; continue it with --resume, or give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"run folder {str(out)!r} cannot be written ({error.strerror}); give another --out") from None
    return _train(config, out, observers)


def resume_run(run: Path, *, overrides: Iterable[str] = (), observers: tuple[Observer, ...] = ()) -> FitResult:
    """Continue an interrupted run, optionally with changed values (a larger budget, say)."""
    folder = run_folder(run)
    data = apply_overrides(load_yaml(folder / CONFIG), overrides)
    config = parse(RunConfig, data, source=str(folder / CONFIG))
    (folder / CONFIG).write_text(to_yaml(config), encoding="utf-8")
    return _train(config, folder, observers)


def _train(config: RunConfig, folder: Path, observers: tuple[Observer, ...]) -> FitResult:
    torch.manual_seed(config.train.seed)
    model = LoopedLM(config.model)
    source = make_source(config.data, seed=config.train.seed)
    return fit(model, source, config.train, folder, observers=observers)


def _with_model(data: Mapping[str, Any]) -> dict[str, Any]:
    """A model given by name becomes its preset's mapping, so that `model.d_model=64` can change it."""
    model = data.get("model")
    return {**data, "model": load_preset("model", model)} if isinstance(model, str) else dict(data)
