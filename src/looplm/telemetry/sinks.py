"""Where metrics are written: JSON lines always, TensorBoard if it is installed. One record per logged step."""

import importlib.util
import json
from pathlib import Path
from typing import IO, Protocol

from looplm.errors import TrainingError

Record = dict[str, float | int]


class Sink(Protocol):
    """Takes records until it is closed."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """Appends to metrics.jsonl, a line a record, flushed at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            raise TrainingError(f"{self.path} could not be written ({error}); free space and resume") from None

    def close(self) -> None:
        try:
            self._file.close()
        except OSError:
            pass  # the write that could not be flushed has already been reported


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


def make_sinks(folder: Path) -> list[Sink]:
    """All sinks of a run folder."""
    sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl")]
    if importlib.util.find_spec("tensorboard") is not None:
        sinks.append(TensorBoardSink(folder / "tensorboard"))
    return sinks
