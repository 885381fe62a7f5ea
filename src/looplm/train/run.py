"""From a run config to a trained run folder: the function behind `looplm train`."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import model_validator

from looplm import dist
from looplm.checkpoint import BUILTIN, CONFIG, MODEL, checkpoints, run_folder, write_text
from looplm.config import Config, apply_overrides, did_you_mean, load_preset, parse, to_yaml
from looplm.data.bpe import TOKENIZER
from looplm.data.bytes import VOCAB_SIZE as N_BYTES
from looplm.data.bytes import BytesConfig
from looplm.data.prepared import PreparedConfig, PreparedSource
from looplm.data.sources import (
    DataConfig,
    PermutationsConfig,
    Source,
    batch_tokens,
    held_out_text,
    make_source,
    row_length,
)
from looplm.data.tasks import permutations
from looplm.data.tokenizer import VOCAB_SIZE
from looplm.errors import ConfigError
from looplm.eval.loops import bits_per_byte, held_out_batches, held_out_loss
from looplm.infer.completer import Codec, Completer, Subwords, Utf8
from looplm.infer.sampling import SamplingConfig
from looplm.model.loop.exit import ACTConfig, GateConfig
from looplm.model.loop.plan import CurriculumPlanConfig, LengthPlanConfig, PoissonPlanConfig
from looplm.model.looped import LoopedLM, ModelConfig
from looplm.model.memory import TRAINED_COPIES, check_batch_fits, check_model_fits
from looplm.reading import read_yaml
from looplm.telemetry.sinks import METRICS, SAMPLES, Record, sample_line
from looplm.train.fit import FitResult, Observer, Validate, check_ranks, fit, saved_state
from looplm.train.looks import attempt
from looplm.train.options import TrainConfig
from looplm.train.vocabulary import given_of_model, vocab_of_text, with_vocab

SAMPLE_PROMPT, SAMPLE_TOKENS = "\n", 60


class RunConfig(Config):
    """Everything a run is."""

    model: ModelConfig
    """The model."""
    data: DataConfig
    """What it learns from."""
    train: TrainConfig
    """How it learns."""

    @model_validator(mode="after")
    def _fits_together(self) -> "RunConfig":
        model, data = self.model, self.data
        if isinstance(data, PermutationsConfig):
            if (model.vocab_size, model.d_head_out) != (permutations.VOCAB_SIZE, permutations.N_ANSWERS):
                raise ValueError(
                    f"permutations need a model with vocab_size {permutations.VOCAB_SIZE} and n_outputs "
                    f"{permutations.N_ANSWERS}, not {model.vocab_size} and {model.d_head_out}: take looplm-s3-54k"
                )
        elif isinstance(data, PreparedConfig):
            pass  # its tokens are known once it is opened
        else:
            n_ids = N_BYTES if isinstance(data, BytesConfig) else VOCAB_SIZE
            if model.vocab_size < n_ids or model.d_head_out < n_ids:
                what = "text as bytes" if isinstance(data, BytesConfig) else "the reasoning suite"
                raise ValueError(f"{what} has {n_ids} tokens and the model {model.d_head_out}: raise vocab_size")
        if not isinstance(data, PermutationsConfig) and isinstance(self.train.plan, LengthPlanConfig):
            raise ValueError("plan kind length ties loops to the length of a sequence; rows of text have none")
        longest = row_length(data)
        wants_last_state = {
            "plan kind poisson": isinstance(self.train.plan, PoissonPlanConfig),
            "train.loop_loss": self.train.loop_loss is not None,
        }
        for name, is_set in wants_last_state.items():
            if is_set and (model.backout or isinstance(model.exit, ACTConfig)):
                raise ValueError(
                    f"{name} takes the state after a loop as the output, and this model's is made of more "
                    f"({'a backout' if model.backout else 'exit ' + model.exit.kind}): leave one of them out"
                )
        if (self.train.exit_gate is not None) != isinstance(model.exit, GateConfig):
            raise ValueError("a learned gate takes both model.exit.kind=gate and train.exit_gate; set both or neither")
        if self.train.exit_gate is not None and model.backout:
            raise ValueError("train.exit_gate takes the state after a loop as the output; a backout reads more than it")
        if isinstance(data, PermutationsConfig) and data.gate is not None:
            if self.train.n_workers:
                raise ValueError("data.gate decides the next batch after this one's step: set train.n_workers to 0")
            if isinstance(self.train.plan, CurriculumPlanConfig):
                raise ValueError("data.gate and plan kind curriculum are both gated on accuracy: take one of them")
        is_gated = isinstance(self.train.plan, CurriculumPlanConfig) or (
            isinstance(data, PermutationsConfig) and data.gate is not None
        )
        if self.train.shard and is_gated:
            raise ValueError("a gate on accuracy runs the whole model between steps: set train.shard to false")
        if longest > model.seq_len:
            raise ValueError(f"sequences of {longest} tokens do not fit the model's seq_len {model.seq_len}: raise it")
        return self


# What may change when a run is continued: nothing that decides a step, only how many steps there are.
PLACES = ("data.path", "data.folders", "data.phases")
CHANGEABLE = tuple(
    f"train.{name}"
    for name in (
        "minutes",
        "steps",
        "tokens",
        "flops",
        "checkpoint_minutes",
        "checkpoint_steps",
        "keep",
        "log_every",
        "probe_every",
        "validate_every",
        "n_workers",
        "recompute",
        "shard",
        "wandb",
    )
)


def resolve_run(
    recipe: str,
    *,
    overrides: Iterable[str] = (),
    model: str | None = None,
    on_choice: Callable[[str], None] | None = None,
) -> RunConfig:
    """The config of a run preset or YAML file with `a.b=c` overrides; `model` names another model preset.

    A model of prepared text has the vocabulary of the text, unless one is given; `on_choice` is called with what it is.
    """
    data, overrides = load_preset("run", recipe), list(overrides)
    if model is not None:
        data["model"] = model
    data = _with_model(data)
    vocab_size = vocab_of_text(apply_overrides(data, overrides))
    given = given_of_model(recipe, model=model, overrides=overrides)
    if vocab_size is not None and "vocab_size" not in given:
        data = with_vocab(data, vocab_size, given=given)
        if on_choice is not None:
            on_choice(f"model.vocab_size={vocab_size}, as the prepared text has")
    return with_absolute_paths(parse(RunConfig, data, source=f"run {recipe!r}", overrides=overrides))


def with_absolute_paths(config: RunConfig, *, of: Iterable[str] | None = None) -> RunConfig:
    """The same run with its data named so that it is found from any folder; of the keys changed by the overrides `of`
    alone, if they are given."""
    data, keys = config.data, PLACES if of is None else {override.partition("=")[0].strip() for override in of}
    if isinstance(data, BytesConfig) and "data.path" in keys:
        data = data.model_copy(update={"path": str(Path(data.path).absolute())})
    elif isinstance(data, PreparedConfig):
        changes: dict[str, Any] = {}
        if "data.folders" in keys:
            changes["folders"] = _absolute(data.folders)
        if "data.phases" in keys:
            changes["phases"] = [
                phase if phase.folders is None else phase.model_copy(update={"folders": _absolute(phase.folders)})
                for phase in data.phases
            ]
        data = data.model_copy(update=changes)
    return config.model_copy(update={"data": data})


def _absolute(folders: Mapping[str, float]) -> dict[str, float]:
    """Weights by absolute path; what is built in stays as it is."""
    found: dict[str, float] = {}
    for name, weight in folders.items():
        place = name if name.startswith(BUILTIN) else str(Path(name).absolute())
        found[place] = found.get(place, 0.0) + weight  # one folder by two names counts as often as both
    return found


def without_places(config: DataConfig) -> dict[str, Any]:
    """The plain data of `config` with its files and folders replaced by numbers, in the order that decides the rows."""
    data = config.model_dump(mode="json", exclude={"path"})
    mixtures = [each for each in (data, *data.get("phases", ())) if each.get("folders")]
    names = sorted({name for each in mixtures for name in each["folders"]})
    for each in mixtures:
        each["folders"] = {names.index(name): weight for name, weight in each["folders"].items()}
    return data


def start_run(
    config: RunConfig, out: Path, *, observers: tuple[Observer, ...] = (), say: Callable[[str], None] | None = None
) -> FitResult:
    """Train in a new folder `out`, with all ranks that torchrun started. A start that fails before its first step
    leaves nothing behind."""
    config = with_absolute_paths(config)
    with dist.process_group(device=config.train.runtime.device), dist.alone_in(out):
        dist.on_main(partial(_check_is_free, out))
        before = set(os.listdir(out)) if dist.is_main() else set()
        try:
            source = _source(config)
            dist.on_main(partial(_write_config, config, source, out))
            return _train(config, source, out, observers=observers, say=say)
        except BaseException:
            if dist.is_main():
                _remove_failed_start(out, kept=before)
            raise


def _check_is_free(out: Path) -> None:
    """Refuse a folder with a trained model in it. A config alone is what a start that was cut short leaves."""
    if checkpoints(out) or (out / MODEL).exists():
        raise ConfigError(f"{str(out)!r} already holds a run; continue it with --resume {out}, or give another --out")


def _write_config(config: RunConfig, source: Source, out: Path) -> None:
    write_text(out / CONFIG, to_yaml(config))
    if isinstance(source, PreparedSource):
        write_text(out / TOKENIZER, source.tokenizer.to_str())


def _remove_failed_start(out: Path, *, kept: set[str]) -> None:
    """Remove what a start has put into its folder, unless a step was trained: then metrics tell of it."""
    metrics = out / METRICS
    if checkpoints(out) or (metrics.exists() and metrics.stat().st_size):
        return
    for path in out.iterdir():
        if path.name in kept:
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def resume_run(
    run: Path,
    *,
    overrides: Iterable[str] = (),
    observers: tuple[Observer, ...] = (),
    say: Callable[[str], None] | None = None,
) -> FitResult:
    """Continue an interrupted run. What it is stays; its budget, how it is watched and saved, and where its data is may
    change."""
    folder = run_folder(run)
    overrides = list(overrides)
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key not in (*CHANGEABLE, *PLACES):
            raise ConfigError(
                f"{key!r} cannot change on resume: the run would be another one"
                f"{did_you_mean(key, (*CHANGEABLE, *PLACES))} What can: {', '.join((*CHANGEABLE, *PLACES))}."
            )
    path = folder / CONFIG
    old = parse(RunConfig, read_yaml(path), source=str(path))
    config = _resumed_config(old, overrides, source=str(path))
    with dist.process_group(device=config.train.runtime.device), dist.alone_in(folder):
        source = _source(config)
        if overrides:
            if dist.from_main(bool(checkpoints(folder))):
                saved_state(
                    folder, source, config.train
                )  # before the config is written over: this may refuse to continue
            dist.on_main(partial(write_text, path, to_yaml(config)))
        return _train(config, source, folder, observers=observers, say=say)


def _resumed_config(old: RunConfig, overrides: list[str], *, source: str) -> RunConfig:
    """The config with its changes. Data may have moved, and its fingerprint tells later whether it is the same; how it
    is mixed may not change."""
    if not overrides:
        return old
    data = old.model_dump(mode="json")
    if any(override.startswith("data.folders=") for override in overrides):
        data["data"].pop("folders", None)  # a mapping would be merged with the old places
    config = with_absolute_paths(parse(RunConfig, data, source=source, overrides=overrides), of=overrides)
    if without_places(config.data) != without_places(old.data):
        raise ConfigError(
            "where the data is may change on resume, and nothing else about it: give as many folders as before, with "
            "the same weights and in the same alphabetical order"
        )
    return config


def _source(config: RunConfig) -> Source:
    check_ranks(config.train)
    _check_memory(config)
    source = make_source(config.data, seed=config.train.seed)
    if config.train.validate_every is not None and isinstance(config.data, BytesConfig | PreparedConfig):
        held_out_text(config.data)  # fail now if there is no held-out text, not at the first validation
    if isinstance(source, PreparedSource) and config.model.vocab_size < source.vocab_size:
        raise ConfigError(
            f"the text has {source.vocab_size} kinds of tokens and the model {config.model.vocab_size}: give "
            f"model.vocab_size={source.vocab_size}"
        )
    return source


def _check_memory(config: RunConfig) -> None:
    """Refuse sizes that the machine cannot have, before they are tried."""
    train = config.train
    device = "cuda" if train.runtime.device != "cpu" and torch.cuda.is_available() else "cpu"
    share = dist.n_ranks() if train.shard else 1
    check_model_fits(config.model, device=device, copies=TRAINED_COPIES, share=share)
    n_tokens = batch_tokens(config.data)
    check_batch_fits(config.data.model_dump(), n_tokens=n_tokens, d_model=config.model.d_model, device=device)


def _train(
    config: RunConfig,
    source: Source,
    folder: Path,
    *,
    observers: tuple[Observer, ...],
    say: Callable[[str], None] | None,
) -> FitResult:
    torch.manual_seed(config.train.seed)
    model = LoopedLM(config.model)
    validate = partial(_validation, config, folder)
    return fit(model, source, config.train, folder=folder, observers=observers, validate=validate, say=say)


def _validation(config: RunConfig, folder: Path) -> Validate:
    """The validation of a model: bits per byte of held-out text, else the held-out loss in nats. A text drawn from the
    model is added to the folder's samples."""
    data, n_loops = config.data, config.model.n_loops
    batches = held_out_batches(data)
    if isinstance(data, BytesConfig | PreparedConfig):
        token_bytes = held_out_text(data).token_bytes
        codec = Utf8() if isinstance(data, BytesConfig) else Subwords(folder)

        def of_text(model: LoopedLM, step: int) -> Record:
            sample = partial(_add_sample, model, folder, codec=codec, step=step)
            attempt("the sample", sample, otherwise=None, step=step)
            return {"val_bpb": bits_per_byte(model, batches, token_bytes, n_loops=n_loops)}

        return of_text
    depth = data.max_len if isinstance(data, PermutationsConfig) else n_loops
    return lambda model, step: {"val_loss": held_out_loss(model, batches, n_loops=depth)}


def _add_sample(model: LoopedLM, folder: Path, *, codec: Codec, step: int) -> None:
    drawn = SamplingConfig(temperature=0.8, top_k=40, seed=step)
    completer = Completer(model, codec)
    (sample,) = completer.complete([SAMPLE_PROMPT], max_new_tokens=SAMPLE_TOKENS, sampling=drawn)
    with (folder / SAMPLES).open("a", encoding="utf-8") as file:
        file.write(sample_line(step, sample.text))


def _with_model(data: Mapping[str, Any]) -> dict[str, Any]:
    """A model given by name becomes its preset's mapping, so that `model.d_model=64` can change it."""
    model = data.get("model")
    return {**data, "model": load_preset("model", model)} if isinstance(model, str) else dict(data)
