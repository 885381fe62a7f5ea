"""Checkpoints: a folder of safetensors and JSON, written under another name and renamed, the marker last.

    RUN/config.yaml                       the resolved config, itself a valid input
    RUN/checkpoints/step-00001200/        model.safetensors  training.safetensors  state.json  COMPLETE
                                          average.safetensors, where weights are averaged: what is read for inference
With train.shard each of these files is a folder, `model.shards/` and so on, of one safetensors file per rank, written
and read by torch.distributed.checkpoint: by any number of ranks, or by none.
A bare `RUN/model.safetensors` beside config.yaml (as in the built-in reasoner) is a run without training state; its
COMPLETE stands beside it, if looplm wrote it.
COMPLETE holds checksums (`checksums.py`), and whatever reads weights or training state checks them first. Nothing is
ever unpickled.
"""

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from looplm import dist
from looplm.checksums import Damage, find_damage, write_checksums
from looplm.config import did_you_mean, parse
from looplm.errors import CheckpointError, ConfigError, FolderError, TrainingError
from looplm.files import LOCK, lock_folder, natural_key, write_whole
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.model.memory import check_model_fits
from looplm.optim.muon import SECOND_MOMENTUM
from looplm.reading import read_json, read_yaml

if TYPE_CHECKING:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

MODEL, AVERAGE, TRAINING, STATE, MARKER, CONFIG = (
    "model.safetensors",
    "average.safetensors",
    "training.safetensors",
    "state.json",
    "COMPLETE",
    "config.yaml",
)
BUILTIN = "builtin:"
RNG = "torch_rng"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
STAGING = ".partial"  # inside a folder that is being made


@dataclass
class LoadedRun:
    """A run folder read back."""

    model: LoopedLM
    config: dict[str, Any]
    """The whole resolved config, as plain data."""
    path: Path
    """Where the weights were read."""


def load(run: str | Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "fp32") -> LoopedLM:
    """The model of a run folder, or of `builtin:reasoner`: newest complete checkpoint, ready for inference, on `device`
    (a text such as cuda:0, or auto for a GPU if there is one) in `dtype` (fp32, bf16, fp16, or torch's own).

    Raises:
        ConfigError: there is no such device or type.
        CheckpointError: there is no such run, or it is damaged.
    """
    return load_run(run, device=device, dtype=dtype).model


def load_run(run: str | Path, *, device: str | torch.device = "cpu", dtype: str | torch.dtype = "fp32") -> LoadedRun:
    """As `load`, with the run's config."""
    to_device, to_dtype = _device(device), _dtype(dtype)
    folder = run_folder(run)
    weights = weights_folder(folder)
    config = _read_config(folder)
    model_config = run_model_config(folder)
    check_model_fits(model_config)
    model = LoopedLM.on("cpu", model_config, draw=False)
    with reading_from(folder, weights, damage_of(weights)):
        load_weights(model, weights / (AVERAGE if _is_there(weights / AVERAGE) else MODEL))
    model.source = f"run {str(run)!r}"
    return LoadedRun(model.to(device=to_device, dtype=to_dtype).eval(), config, weights)


def _device(device: str | torch.device) -> torch.device:
    """A device that tensors can be put on here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, str | torch.device):
        try:
            found = torch.device(device)
            if found.type != "meta":
                torch.empty(1, device=found)
                return found
        except (RuntimeError, AssertionError, NotImplementedError):  # AssertionError: torch without that device
            pass
    raise ConfigError(
        f"device {str(device)!r} cannot be used here; give cpu, cuda or cuda:0 where there is a GPU, or auto"
    )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    names = {str(known).removeprefix("torch."): known for known in DTYPES.values()}
    known = DTYPES | names
    found = known.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in DTYPES.values():
        raise ConfigError(
            f"dtype {str(dtype)!r} is none that a model runs in{did_you_mean(dtype, DTYPES)} "
            f"Types: {', '.join(DTYPES)}, or torch's own."
        )
    return found


def run_model_config(run: str | Path) -> ModelConfig:
    """The model's config of a run folder, or of `builtin:reasoner`."""
    folder = run_folder(run)
    return parse(ModelConfig, _read_config(folder)["model"], source=str(folder / CONFIG))


def _read_config(folder: Path) -> dict[str, Any]:
    """The config of a run folder: sections, of which a model there always is."""
    path = folder / CONFIG
    config = read_yaml(path)
    for name in ("model", *config):
        if not isinstance(config.get(name), dict):
            raise CheckpointError(f"{path} has no `{name}:` section of keys and values; it is not the config of a run")
    return config


def run_folder(run: str | Path) -> Path:
    """The folder of a run by path or by `builtin:NAME`."""
    if not isinstance(run, str | os.PathLike):
        raise CheckpointError(f"a run is named by its folder or as builtin:reasoner, not by {run!r:.60}")
    text = str(run)
    if text.startswith(BUILTIN):
        root = Path(str(resources.files("looplm"))) / "builtin"
        names = sorted(path.parent.name for path in root.glob(f"*/{MODEL}"))
        if text.removeprefix(BUILTIN) not in names:
            known = [BUILTIN + name for name in names]
            raise CheckpointError(f"no built-in model {text!r}{did_you_mean(text, known)} There is {', '.join(known)}.")
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
    return sorted((path.parent for path in folder.glob(f"checkpoints/step-*/{MARKER}")), key=natural_key)


def latest_checkpoint(folder: Path) -> Path:
    """The newest complete checkpoint of a run."""
    found = checkpoints(folder)
    if not found:
        raise CheckpointError(f"{str(folder)!r} holds no complete checkpoint; the run was stopped before its first one")
    return found[-1]


def load_weights(model: LoopedLM, path: Path) -> None:
    """Read weights into `model`, in the model's own type; missing, extra and misshapen keys are listed in one error."""
    _read_weights(own_tensors(model), path)


def _read_weights(targets: Mapping[str, Tensor], path: Path) -> None:
    problems = mismatches({name: tensor.shape for name, tensor in targets.items()}, described(path))
    if problems:
        raise CheckpointError(f"{path} does not fit the model of its config: {'; '.join(problems)}")
    read_into(targets, path)


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
    """A safetensors file, whole or put together from its shards, or one clear error."""
    if _shards(path).is_dir():
        tensors = {name: torch.empty_like(tensor, device="cpu") for name, tensor in described(path).items()}
        read_into(tensors, path)
        return tensors
    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is cut short or not a safetensors file ({error}); restore or retrain it"
        ) from None


def described(path: Path) -> dict[str, Tensor]:
    """What a safetensors file, or its shards, holds, without its numbers: on the meta device."""
    if not _shards(path).is_dir():
        return {name: tensor.to("meta") for name, tensor in read_tensors(path).items()}
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with _naming_shards(path):
        entries = _reader(path).read_metadata().state_dict_metadata
    found = {name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    for name, entry in found.items():
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise CheckpointError(
                f"{_shards(path)} lacks a part of {name}: a file of it is gone; restore or retrain it"
            )
    return {name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta") for name, entry in found.items()}


def read_into(targets: Mapping[str, Tensor], path: Path) -> None:
    """Fill tensors by name from a safetensors file or its shards; of sharded tensors, this rank's part."""
    if _shards(path).is_dir():
        import torch.distributed.checkpoint as dcp  # takes as long as torch itself

        with _naming_shards(path), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a warning that one process alone gets
            dcp.load(dict(targets), storage_reader=_reader(path), no_dist=True)
        return
    found = read_tensors(path)
    for name, target in targets.items():
        dist.local(target).copy_(dist.part_of(found[name].to(target.device), like=target))


def _is_there(path: Path) -> bool:
    return path.is_file() or _shards(path).is_dir()


def _shards(path: Path) -> Path:
    """The folder that stands for a file in a sharded checkpoint."""
    return path.with_suffix(".shards")


def _reader(path: Path) -> "HuggingFaceStorageReader":
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(_shards(path)))  # safetensors: the usual one reads a pickle


def _reason(error: BaseException) -> str:
    """What went wrong with shards; of several ranks each once, without their tracebacks."""
    from torch.distributed.checkpoint.api import CheckpointException

    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(sorted({str(failure[0]) for failure in error.failures.values()}))


@contextmanager
def _naming_shards(path: Path) -> Iterator[None]:
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{_shards(path)} is cut short or not safetensors ({_reason(error)}); restore or retrain it"
        ) from None


def save_weights(model: LoopedLM, path: Path, *, dtype: torch.dtype | None = None) -> None:
    """Write the weights, tied ones once, optionally in a smaller type."""
    save_tensors({name: t.detach().to(dtype or t.dtype) for name, t in own_tensors(model).items()}, path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, with texts in its header."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


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
    is_sharded: bool = False,
) -> Path:
    """Write one complete checkpoint, with averaged weights if there are any, and delete all but the newest `keep`. All
    ranks call it; with `is_sharded` each writes its own part, else rank 0 everything. A failure leaves the earlier ones
    intact, and all ranks raise it."""
    final = folder / "checkpoints" / f"step-{step:08d}"
    if dist.from_main((final / MARKER).exists()):
        return final
    temporary, unnamed = final.with_name(final.name + ".partial"), MARKER + ".new"
    files: dict[str, Mapping[str, Tensor]] = {
        MODEL: {name: tensor.detach() for name, tensor in own_tensors(model).items()},
        TRAINING: optimizer_tensors(optimizers) | {RNG: torch.get_rng_state()},
    }
    if average is not None:
        files[AVERAGE] = average

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
        temporary.mkdir(parents=True)

    def end() -> None:
        (temporary / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        names = [path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()]
        write_checksums(temporary / unnamed, names)
        for path in temporary.rglob("*"):
            _sync(path)
        temporary.rename(final)
        (final / unnamed).rename(final / MARKER)
        _sync(final)
        _sync(final.parent)  # the rename itself, before anything older is deleted
        _remove_old(folder, keep=keep)

    try:
        dist.on_main(begin)
        for name, tensors in files.items():
            if is_sharded:
                _save_shards(tensors, temporary / name)
            else:
                dist.on_main(partial(save_tensors, tensors, temporary / name))
        dist.on_main(end)
    except (OSError, SafetensorError) as error:
        if dist.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        left = checkpoints(folder)
        kept = f"the last one, {left[-1]}, is intact" if left else "there is no earlier one"
        raise TrainingError(
            f"checkpoint {final} could not be written ({error}); {kept}. Free space and resume."
        ) from None
    return final


def _save_shards(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write this rank's part of a file; all ranks call it, and what fails on one of them is an OSError on all."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    writer = dcp.HuggingFaceStorageWriter(str(_shards(path)), save_distributed=True)
    try:
        dcp.save(dict(tensors), storage_writer=writer)
    except CheckpointException as error:
        raise OSError(_reason(error)) from None


def read_state(folder: Path) -> dict[str, Any]:
    """The state saved with the newest complete checkpoint: what a resume needs to know before it builds anything."""
    path = latest_checkpoint(folder)
    with reading_from(folder, path, damage_of(path, only=[STATE])):
        return read_json(path / STATE, error=CheckpointError)


def load_checkpoint(folder: Path, *, model: LoopedLM, optimizers: list[Optimizer]) -> None:
    """Restore the newest complete checkpoint into model and optimizers."""
    path = latest_checkpoint(folder)
    # one rank reads all of it for its checksums, not every rank
    damage = dist.from_main(damage_of(path) if dist.is_main() else None)
    with reading_from(folder, path, damage):
        load_weights(model, path / MODEL)
        _restore_training(optimizers, path / TRAINING)


def load_average(folder: Path, *, into: Mapping[str, Tensor]) -> None:
    """Restore the averaged weights of the newest complete checkpoint, by the names of `own_tensors`. What
    `load_checkpoint` has checked is not checked again."""
    path = latest_checkpoint(folder)
    with reading_from(folder, path, None):
        _read_weights(into, path / AVERAGE)


def optimizer_tensors(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """All optimizer state as named tensors: `{optimizer}.{parameter}.{name}`. Rates are recomputed from the config."""
    return {
        f"{number}.{index}.{name}": value.contiguous()
        for number, optimizer in enumerate(optimizers)
        for index, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _restore_training(optimizers: list[Optimizer], path: Path) -> None:
    """The inverse of `optimizer_tensors`, and the generator's state."""
    found = described(path)
    if RNG not in found:
        raise CheckpointError(f"{path} holds no generator state; it is not a training checkpoint")
    targets = {RNG: torch.empty_like(found.pop(RNG), device="cpu")}
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    parameters = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    for key, tensor in found.items():
        number, index, name = (*key.split(".", 2), "", "")[:3]
        if not (number.isdecimal() and index.isdecimal() and name):
            raise CheckpointError(f"{path} holds {key!r}, which is no state of an optimizer; restore or retrain it")
        if int(number) >= len(optimizers) or int(index) >= len(parameters[int(number)]):
            raise CheckpointError(f"{path} was written by other optimizers than the config names")
        parameter = parameters[int(number)][int(index)]
        if any(size not in (1, own) for size, own in zip(tensor.shape, parameter.shape, strict=False)):
            raise CheckpointError(
                f"{path} does not fit the model: {key} is {tuple(tensor.shape)}; restore or retrain it"
            )
        # what is shaped as its parameter is shared out as that is, but for what is whole on every rank
        is_like = tensor.shape == parameter.shape and name != SECOND_MOMENTUM
        target = torch.zeros_like(parameter, dtype=tensor.dtype) if is_like else torch.zeros_like(tensor, device="cpu")
        targets[key] = states[int(number)].setdefault(int(index), {})[name] = target
    read_into(targets, path)
    if targets[RNG].dtype != torch.uint8 or targets[RNG].shape != torch.get_rng_state().shape:
        raise CheckpointError(f"{path} holds another generator's state; restore or retrain it")
    torch.set_rng_state(targets[RNG])
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


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A model folder that is made whole or not at all. Write into the folder that is yielded: its files move to `out`
    at the end, with their checksums, the config last. All is as before if anything fails.

    Raises:
        FolderError: `out` holds something, cannot be written into, or another process is writing into it.
    """
    with lock_folder(out):
        staging = out / STAGING
        shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
        held = sorted(path.name for path in out.iterdir() if path.name != LOCK)
        if held:
            raise FolderError(f"{str(out)!r} is not empty (it holds {held[0]!r}); give a new folder")
        moved: list[Path] = []
        try:
            staging.mkdir()
            yield staging
            names = sorted((path.name for path in staging.iterdir()), key=lambda name: (name == CONFIG, name))
            # the config is left out: it is a file that people edit
            write_checksums(staging / MARKER, [name for name in names if name != CONFIG])
            for path in staging.iterdir():
                _sync(path)
            for name in [MARKER, *names]:
                moved.append((staging / name).rename(out / name))
            _sync(out)
        except BaseException as error:  # Ctrl-C too
            for path in moved:
                path.unlink()
            if isinstance(error, OSError | SafetensorError):
                reason = error.strerror if isinstance(error, OSError) and error.strerror else error
                raise FolderError(f"{str(out)!r} could not be written ({reason}); nothing is left of it") from None
            raise
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _remove_old(folder: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints, and whatever was left half written."""
    complete = checkpoints(folder)
    for old in complete[:-keep]:
        (old / MARKER).unlink()
    for path in (folder / "checkpoints").glob("step-*"):
        if path not in complete[-keep:]:
            shutil.rmtree(path)


@contextmanager
def reading_from(folder: Path, path: Path, damage: Damage | None) -> Iterator[None]:
    """Read from `path`, a checkpoint of the run `folder` or, for weights without training state, the folder itself.
    `damage` is what is known to be wrong with it. An error names the earlier checkpoint that can take its place.

    Raises:
        CheckpointError: there is damage.
    """
    try:
        if damage is not None and not damage.is_readable:
            raise CheckpointError(f"{damage}; restore or retrain it")
        yield
        if damage is not None:
            raise CheckpointError(f"{damage}; restore or retrain it")
    except CheckpointError as error:
        before = None if path == folder else _whole_before(folder, path)
        hint = "" if before is None else f". An earlier checkpoint is there: delete {path} to go back to {before.name}."
        raise CheckpointError(f"{error}{hint}") from None


def damage_of(path: Path, *, only: Iterable[str] | None = None) -> Damage | None:
    """The first file of a checkpoint or model folder that is not as it was written; with `only`, of these. A folder
    without checksums is taken as it is."""
    return find_damage(path / MARKER, only=only) if (path / MARKER).is_file() else None


def _whole_before(folder: Path, path: Path) -> Path | None:
    """The newest checkpoint of a run before `path` that is not damaged too."""
    earlier = list(takewhile(lambda other: other != path, checkpoints(folder)))
    return next((other for other in reversed(earlier) if damage_of(other) is None), None)


def _sync(path: Path) -> None:
    """Make a file or folder durable before anything that relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
