"""Where metrics are written: JSON lines always, TensorBoard if it is installed. One record per logged step."""

import importlib.util
import json
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

from looplm.errors import TrainingError

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
            if path.exists():
                kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= from_step]
                temporary = path.with_name(path.name + ".partial")
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                temporary.replace(path)
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
    """Every number of a record as a scalar over steps. A copy for looking at: if it cannot be written it stops, and
    metrics.jsonl, which holds the same, decides whether the run can go on."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._is_open = True
        self._writer = SummaryWriter(str(folder))

    def write(self, record: Record) -> None:
        try:
            for name, value in record.items():
                if self._is_open:
                    self._writer.add_scalar(name, value, int(record["step"]))
        except OSError:
            self._is_open = False

    def close(self) -> None:
        with suppress(OSError):
            self._writer.close()


def make_sinks(folder: Path, *, from_step: int) -> list[Sink]:
    """All sinks of a run folder that stands at `from_step`."""
    sinks: list[Sink] = [JsonlSink(folder / METRICS, from_step=from_step)]
    if importlib.util.find_spec("tensorboard") is not None:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    return sinks


def _step_of(line: str) -> float:
    """The step of a record; infinite for a line that was cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
