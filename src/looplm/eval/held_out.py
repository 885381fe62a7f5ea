"""The text of a run, found again: runs made by older versions name it relative to where they were started."""

from pathlib import Path

from looplm.checkpoint import LoadedRun
from looplm.data.bpe import TOKENIZER, load_tokenizer
from looplm.data.bytes import BytesConfig
from looplm.data.documents import BUILTIN_PYTHON
from looplm.data.prepared import PreparedConfig
from looplm.data.sources import parse_data
from looplm.errors import DataError


def located_text(loaded: LoadedRun, *, folder: Path, given: Path | None = None) -> BytesConfig | PreparedConfig:
    """The data of a run of text with paths that exist: `given`, or where they say, from the working directory or from
    the run's folder upwards.

    Raises:
        DataError: the text is nowhere, or `given` does not fit the run.
    """
    data = parse_data(loaded.config["data"], source=str(loaded.path))
    assert isinstance(data, BytesConfig | PreparedConfig)
    if isinstance(data, BytesConfig):
        return data.model_copy(update={"path": str(given or _found(data.path, folder))})
    names = sorted({name for phase in data.in_full() for name in phase.folders})
    if given is not None:
        if len(names) > 1:
            raise DataError(f"the run mixes {len(names)} folders of text and --data gives one: {', '.join(names)}")
        _check_tokenizer(given, folder)
    places = {name: str(given or _found(name, folder)) for name in names}
    phases = [
        phase.model_copy(update={"folders": phase.folders and _moved(phase.folders, places)}) for phase in data.phases
    ]
    return data.model_copy(update={"folders": _moved(data.folders, places), "phases": phases})


def _moved(folders: dict[str, float], places: dict[str, str]) -> dict[str, float]:
    return {places.get(name, name): weight for name, weight in folders.items()}


def _found(name: str, folder: Path) -> str:
    if name == BUILTIN_PYTHON or Path(name).exists():
        return name
    for parent in (folder.resolve(), *folder.resolve().parents):  # a run is often made below its text
        if (parent / name).exists():
            return str(parent / name)
    raise DataError(f"the text {name!r} that the run was trained on is not there; say where it is: --data PATH")


def _check_tokenizer(given: Path, folder: Path) -> None:
    """Refuse text whose token ids mean other words than the run's."""
    if load_tokenizer(given).get_vocab() != load_tokenizer(folder / TOKENIZER).get_vocab():
        raise DataError(f"--data {str(given)!r} was prepared with another tokenizer than the run's; prepare it with it")
