"""Runs that were trained on plain text."""

from pathlib import Path

from looplm.checkpoint import LoadedRun, run_folder
from looplm.data.bpe import TOKENIZER
from looplm.errors import CheckpointError
from looplm.infer.completer import Completer, Subwords, Utf8


def as_completer(loaded: LoadedRun, *, run: str | Path) -> Completer:
    """A loaded run that continues texts, with the tokenizer of its folder.

    Raises:
        CheckpointError: the run was not trained on text.
    """
    kind = loaded.config.get("data", {}).get("kind")
    if kind == "bytes":
        return Completer(loaded.model, Utf8())
    if kind == "prepared":
        return Completer(loaded.model, Subwords(run_folder(run) / TOKENIZER))
    raise CheckpointError(f"{str(run)!r} was trained on {kind!r}, not on text; give a run of `looplm train pretrain`")
