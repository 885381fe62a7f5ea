"""Where metrics are written: JSON lines always, TensorBoard if it is installed. One record per logged step."""

import importlib.util
import json
import logging
import re
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import IO, Protocol

from looplm.errors import ConfigError, TrainingError
from looplm.files import write_whole
from looplm.reading import read_yaml

logger = logging.getLogger(__name__)
Record = dict[str, float | int]
METRICS, SAMPLES = "metrics.jsonl", "samples.txt"  # of a run folder


class Sink(Protocol):
    """Takes records until it is closed."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends to metrics.jsonl, a line a record, flushed at once. Records beyond `from_step`, which a killed run wrote
    after its last checkpoint, are dropped first: the resumed run writes them again."""

    def __init__(self, path: Path, *, from_step: int = 0) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _rewind(path, lambda line: _step_of(line) <= from_step)
            self._file: IO[str] = path.open("a", encoding="utf-8")
        except OSError as error:
            raise TrainingError(f"{path} could not be written ({error}); free space and resume") from None

    def write(self, record: Record) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"{self.path} could not be written ({error}); free space and resume") from None

    def close(self) -> None:
        with suppress(OSError):  # the write that could not be flushed has already been reported
            self._file.close()


class TensorBoardSink:
    """Every number of a record as a scalar over steps."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        for name, value in record.items():
            self._writer.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        self._writer.close()


class Copy:
    """A sink for looking at. Whatever goes wrong in it, it stops with one warning: metrics.jsonl, which holds the same,
    decides whether the run can continue."""

    def __init__(self, name: str, sink: Sink) -> None:
        self.name, self.sink, self.is_open = name, sink, True

    def write(self, record: Record) -> None:
        if self.is_open:
            self._try(partial(self.sink.write, record))

    def close(self) -> None:
        self._try(self.sink.close)

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            if self.is_open:
                logger.warning("%s gets no more records (%s); metrics.jsonl does", self.name, first_line(error))
            self.is_open = False


class WandbSink:
    """Every record to a project of Weights & Biases, or with WANDB_MODE=offline to RUN/wandb, for `wandb sync` later. A
    resumed run continues in the same place."""

    def __init__(self, project: str, folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise ConfigError("train.wandb takes wandb, which is not installed: pip install 'looplm[track]'") from None
        kept = folder / "wandb_id.txt"  # drawn once for a run, and moved with its folder
        if not kept.exists():
            write_whole(kept, uuid.uuid4().hex[:16].encode())
        config = read_yaml(folder / "config.yaml")
        try:
            self._run = wandb.init(
                project=project,
                name=folder.name,
                id=kept.read_text(encoding="utf-8"),
                dir=folder,
                config=config,
                resume="allow",
                settings=wandb.Settings(console="off", silent=True),  # the terminal is the progress bar's
            )
        except (wandb.Error, OSError) as error:
            raise ConfigError(
                f"Weights & Biases does not take project {project!r} ({error}): wandb login, or WANDB_MODE=offline"
            ) from None

    def write(self, record: Record) -> None:
        self._run.log(record, step=int(record["step"]))

    def close(self) -> None:
        self._run.finish()


def make_sinks(folder: Path, *, from_step: int, wandb: str | None = None) -> list[Sink]:
    """All sinks of a run folder that stands at `from_step`; `wandb` names a project.

    Raises:
        ConfigError: wandb is missing, or not logged in.
    """
    sinks: list[Sink] = [JsonlSink(folder / METRICS, from_step=from_step)]
    _rewind(folder / SAMPLES, lambda line: _step_of_sample(line) <= from_step)
    if wandb is not None:
        sinks.append(Copy("Weights & Biases", WandbSink(wandb, folder)))
    if importlib.util.find_spec("tensorboard") is not None:
        try:
            sinks.append(Copy("TensorBoard", TensorBoardSink(folder / "tensorboard")))
        except Exception as error:  # an installation that does not fit, a disk that is full
            logger.warning("TensorBoard gets no records (%s); metrics.jsonl does", first_line(error))
    return sinks


def first_line(error: Exception) -> str:
    """What an error is and says, in one line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}{f': {lines[0]}' if lines else ''}"


def sample_line(step: int, text: str) -> str:
    """A line of samples.txt."""
    return f"step {step}: {text!r}\n"


def _step_of_sample(line: str) -> float:
    """The step of a sample; infinite for a line that was cut short."""
    found = re.fullmatch(r"step (\d+): (['\"]).*\2", line)
    return float("inf") if found is None else float(found[1])


def _rewind(path: Path, is_kept: Callable[[str], bool]) -> None:
    """Drop the lines that a killed run wrote after its last checkpoint: the resumed one writes them again."""
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        write_whole(path, "".join(f"{line}\n" for line in lines if is_kept(line)).encode())


def _step_of(line: str) -> float:
    """The step of a record; infinite for a line that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
