"""What a run has written of itself, read back."""

from pathlib import Path

from looplm.errors import CheckpointError
from looplm.reading import parse_json, read_text
from looplm.telemetry.sinks import METRICS, Record

MOST_BYTES = 1 << 30  # some millions of records


def read_history(run: Path) -> list[Record]:
    """All records of a run folder, oldest first. A line that is being written is left out.

    Raises:
        CheckpointError: the folder holds no metrics.
    """
    path = run / METRICS
    if not path.is_file():
        raise CheckpointError(f"{str(run)!r} holds no {METRICS}; give a folder that `looplm train` made")
    records = []
    for line in read_text(path, most=MOST_BYTES, error=CheckpointError).splitlines():
        try:
            records.append(parse_json(line))
        except ValueError:
            continue
    return records


def series(records: list[Record], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one number, where it was written."""
    found = [(float(record["step"]), float(record[name])) for record in records if name in record]
    return [step for step, _ in found], [value for _, value in found]
