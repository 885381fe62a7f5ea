"""The vocabulary of a model that trains on prepared text: that of the text, unless the user gave one.

A preset's number does not count as given: it is of the tokenizer that the preset was written for.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from looplm.config import apply_overrides
from looplm.data.documents import BUILTIN_PYTHON
from looplm.data.manifest import MANIFEST, read_manifest
from looplm.reading import read_yaml

FILES = (".yaml", ".yml")


def given_of_model(recipe: str, *, model: str | None, overrides: Iterable[str]) -> set[str]:
    """The keys of the model's config that an override or a YAML file of the user's says."""
    sections = [apply_overrides({}, overrides).get("model")]
    if model is None and recipe.endswith(FILES):
        section = read_yaml(Path(recipe)).get("model")
        model = section if isinstance(section, str) else None
        sections.append(section)
    if model is not None and model.endswith(FILES):
        sections.append(read_yaml(Path(model)))
    return {key for section in sections if isinstance(section, Mapping) for key in section}


def vocab_of_text(data: Mapping[str, Any]) -> int | None:
    """The vocabulary size of the prepared folders that a run's config names; None where there are none, or not yet."""
    section = data.get("data")
    if not isinstance(section, Mapping) or section.get("kind") != "prepared":
        return None
    folders = section.get("folders")
    names = [folders] if isinstance(folders, str) else list(folders) if isinstance(folders, Mapping) else []
    for name in names:
        if name != BUILTIN_PYTHON and (Path(str(name)) / MANIFEST).is_file():
            return read_manifest(Path(str(name))).vocab_size
    return None


def with_vocab(data: Mapping[str, Any], vocab_size: int, *, given: set[str]) -> dict[str, Any]:
    """A run's config whose model has this vocabulary. Which ids of it are used is a preset's number too."""
    changes = {"vocab_size": vocab_size, "used_vocab": None}
    return {**data, "model": {**data["model"], **{key: changes[key] for key in changes.keys() - given}}}
