"""The records of a run, read back."""

from pathlib import Path
from typing import Any

from looplm.errors import CheckpointError
from looplm.reading import parse_json, read_text
from looplm.telemetry.sinks import METRICS, Record

MOST_BYTES = 1 << 30  # some millions of records


def read_history(run: Path) -> list[Record]:
    """All records of a run folder, oldest first. What is no record, such as a line that is being
    written, is left out.

    Raises:
        CheckpointError: the folder holds no metrics.
    """
    path = run / METRICS
    if not path.is_file():
        raise CheckpointError(f"{str(run)!r} holds no {METRICS}; give a folder that `looplm train` made")
    records = []
    for line in read_text(path, most=MOST_BYTES, error=CheckpointError).splitlines():
        try:
            record = parse_json(line)
        except ValueError:
            continue
        if _is_record(record):
            records.append(record)
    return records


def _is_record(found: Any) -> bool:
    """Whether a line is a record: numbers by name, the step among them."""
    return isinstance(found, dict) and "step" in found and all(isinstance(n, int | float) for n in found.values())


def series(records: list[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one number, where it was written."""
    found = [(float(record["step"]), float(record[name])) for record in records if name in record]
    return [step for step, _ in found], [value for _, value in found]
