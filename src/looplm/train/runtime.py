"""How a run uses the machine: device, precision, compilation, threads. Chosen once, by device or by a short probe, and
kept in the checkpoint, since another choice would change the numbers of a resumed run."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field

from looplm.config import Config, PositiveInt
from looplm.errors import ConfigError
from looplm.model.compiler import has_compiler
from looplm.model.looped import LoopedLM

MOST_THREADS = 1024  # each takes its own memory; a hundred thousand end the process


class RuntimeConfig(Config):
    """`auto` is resolved at the start of a run; the choice is kept in its checkpoints."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train; auto takes a GPU if there is one."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast type; auto takes the faster of a probe on a CPU, bf16 on a GPU."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the blocks; auto does for runs of minutes where a C++ compiler and Python's headers are found."""
    n_threads: Annotated[PositiveInt, Field(le=MOST_THREADS)] | Literal["auto"] = "auto"
    """CPU threads; auto probes all cores against one."""


@dataclass(frozen=True)
class Runtime:
    """The choice made."""

    device: str
    precision: Literal["bf16", "fp32"]
    compile: bool
    n_threads: int

    def autocast(self) -> torch.autocast:
        """The context a forward runs in."""
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.precision == "bf16")

    def apply(self, model: LoopedLM, *, rows_vary: bool = False) -> None:
        """Move the model, set the threads, arrange compilation, for any number of rows if they vary."""
        torch.set_num_threads(self.n_threads)
        model.to(self.device)
        if self.compile:
            model.compile_parts(rows_vary=rows_vary)


def choose_runtime(config: RuntimeConfig, *, trial: Callable[[Runtime], None], long_run: bool) -> Runtime:
    """Resolve every `auto`. `trial` runs one forward and backward of the real job under a runtime."""
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.runtime.device is cuda, and torch sees no GPU; use cpu or auto")
    compiles = config.compile is True or (config.compile == "auto" and long_run and has_compiler())
    if config.compile is True and not has_compiler():
        raise ConfigError(
            "train.runtime.compile is true, and there is no C++ compiler (g++ or clang++) or no Python.h; "
            "install them, or set it false"
        )
    all_threads = torch.get_num_threads()
    if device == "cuda":
        n_threads = all_threads if config.n_threads == "auto" else config.n_threads
        return Runtime(device, "bf16" if config.precision == "auto" else config.precision, compiles, n_threads)
    precisions: list[Literal["bf16", "fp32"]] = ["bf16", "fp32"] if config.precision == "auto" else [config.precision]
    most, fewest = (all_threads, 1) if config.n_threads == "auto" else (config.n_threads, config.n_threads)
    candidates = [Runtime(device, precision, compiles, most) for precision in precisions]
    if len(candidates) == 1 and fewest == most:
        return candidates[0]
    seconds = {candidate: _seconds(trial, candidate) for candidate in candidates}
    best = min(candidates, key=lambda candidate: seconds[candidate])
    if fewest < most:  # with the better precision only: a probe costs seconds of the run's time
        fewer = replace(best, n_threads=fewest)
        if FEWER_THREADS_HANDICAP * _seconds(trial, fewer) < seconds[best]:
            best = fewer
    torch.set_num_threads(all_threads)
    return best


# A probe of seconds decides for a run of minutes. Another job during the probe must not cost half of the machine, so
# one thread is taken only if it is clearly faster (tiny models, cores that are busy all the time).
FEWER_THREADS_HANDICAP = 1.3


def _seconds(trial: Callable[[Runtime], None], candidate: Runtime) -> float:
    """Best of two after a warm-up: shared machines only ever add time."""
    torch.set_num_threads(candidate.n_threads)
    trial(candidate)
    times = []
    for _ in range(2):
        started = time.perf_counter()
        trial(candidate)
        times.append(time.perf_counter() - started)
    return min(times)
