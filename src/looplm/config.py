"""Loading, overriding, validating and saving configs.

Config classes live beside the class they configure and inherit from `Config`. A config file is YAML, may name one
`base:` preset, and is always saved resolved: what stands beside a checkpoint is itself a valid input.
"""

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from looplm.errors import ConfigError
from looplm.reading import dump_yaml, parse_yaml, read_yaml

PRESETS = Path(__file__).parent / "presets"
PresetKind = Literal["model", "run"]


class Config(BaseModel):
    """Base of all configs: frozen, unknown keys refused, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


C = TypeVar("C", bound=Config)


def parse(cls: type[C], data: Mapping[str, Any], *, source: str) -> C:
    """Build `cls` from plain data, or raise one ConfigError that names the key, the value and the mend."""
    try:
        return cls.model_validate(dict(data))
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(cls, error)}") from None


def preset_names(kind: PresetKind) -> list[str]:
    """Names of the presets of one kind, sorted."""
    return sorted(path.stem for path in (PRESETS / kind).glob("*.yaml"))


def load_preset(kind: PresetKind, name_or_path: str) -> dict[str, Any]:
    """The plain data of a preset by name, or of a YAML file by path, with its `base:` merged in below it."""
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
    else:
        names = preset_names(kind)
        if name_or_path not in names:
            raise ConfigError(
                f"no {kind} preset named {name_or_path!r}{did_you_mean(name_or_path, names)} "
                f"Presets: {', '.join(names)}."
                " A path ending in .yaml is read as a file."
            )
        path = PRESETS / kind / f"{name_or_path}.yaml"
    data = read_yaml(path)
    base = data.pop("base", None)
    if base is None:
        return data
    if base not in preset_names(kind) or base == path.stem:
        raise ConfigError(f"{path}: base {base!r} is not a {kind} preset; presets: {', '.join(preset_names(kind))}")
    return merge(load_preset(kind, base), data)


def published_sizes(preset: str) -> dict[str, Any]:
    """What was published about the original of a model preset (presets/published.yaml), empty where nothing was."""
    found: dict[str, Any] = read_yaml(PRESETS / "published.yaml").get(preset, {})
    return dict(found)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, mapping by mapping. A mapping with another `kind` replaces the whole mapping below it,
    since the keys of one kind mean nothing to another."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = value
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            is_same_kind = "kind" not in value or value["kind"] == below.get("kind")
            merged[key] = merge(below, value) if is_same_kind else value
    return merged


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=value` strings; values are read as YAML (`3`, `1e-3`, `true`, `[1, 2]`, `{kind: none}`)."""
    result = dict(data)
    for text in overrides:
        key, separator, value_text = text.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"override {text!r} is not of the form key.key=value")
        try:
            value = parse_yaml(value_text)
        except ValueError as error:
            raise ConfigError(f"override {text!r}: the value {value_text!r} is not valid YAML ({error})") from None
        nested: Any = value
        for part in reversed(key.strip().split(".")):
            nested = {part: nested}
        result = merge(result, nested)
    return result


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, with every default written out."""
    return dump_yaml(config.model_dump(mode="json"))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where something close is known, else a full stop."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    """One line for the first problem pydantic found, with the number of further ones."""
    problems = error.errors()
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"]) or "(top level)"
    if first["type"] == "extra_forbidden":
        known = _known_keys(cls, first["loc"][:-1])
        text = f"unknown key {where!r}{did_you_mean(str(first['loc'][-1]), known)}"
        if known:
            text += f" Known keys here: {', '.join(known)}."
    elif first["type"] == "missing":
        text = f"key {where!r} is required and not given."
    elif first["type"] == "value_error":
        text = f"{where}: {first['msg'].removeprefix('Value error, ')}"
    elif first["type"] == "union_tag_invalid":
        expected = first.get("ctx", {}).get("expected_tags", "")
        tag = str(first.get("ctx", {}).get("tag", ""))
        known = [name.strip(" '") for name in expected.split(",")]
        text = f"{where}: unknown kind {tag!r}{did_you_mean(tag, known)} Known kinds: {expected}."
    else:
        text = f"{where}: {first['msg']}, got {first['input']!r}."
    return text if len(problems) == 1 else f"{text} ({len(problems) - 1} more problems after this one)"


def _known_keys(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys of the (possibly tagged) config at `path` below `cls`."""
    options: list[Any] = [cls]
    for part in path:
        found: list[Any] = []
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                if part in option.model_fields:
                    found += _config_classes(option.model_fields[str(part)].annotation)
                elif option.model_fields.get("kind") and option.model_fields["kind"].default == part:
                    found.append(option)
        options = found
    return sorted({key for option in options for key in option.model_fields})


def _config_classes(annotation: Any) -> list[Any]:
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [cls for part in get_args(annotation) for cls in _config_classes(part)]
