"""Loading, overriding, validating and saving configs.

Config classes live beside the class they configure and inherit from `Config`. A config file is YAML, may name one
`base:` preset, and is always saved resolved: what stands beside a checkpoint is itself a valid input. Numbers in a
config have the types below, not pydantic's of the same names.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from looplm.errors import ConfigError
from looplm.reading import MOST_LEVELS, dump_yaml, parse_yaml, read_yaml

PRESETS = Path(__file__).parent / "presets"
PresetKind = Literal["model", "run"]
LARGEST = 2**63 - 1  # whole numbers beyond have no place in a tensor
MOST_SIZE = 2**31 - 1  # of one dimension; what a machine has memory for is decided when a run starts
MOST_LAYERS = 1000  # each is a Python object, whatever its size
MOST_LOOPS = 100_000
MOST_SCALE = 1e30  # and its inverse: what fp32 holds with room for what it is multiplied by


class Config(BaseModel):
    """Base of all configs: frozen; unknown keys are refused, and defaults are checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


def _as_number(value: Any) -> Any:
    """Refuse what Python and pydantic would take for a number: true is 1, and '3' is 3."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number; write 1 or 0 if that is meant")
    if isinstance(value, str) and value.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        raise ValueError(f"Input should be a finite number, got {value!r}")
    if isinstance(value, str | bytes):
        raise ValueError(f"the text {_shown(value)} is not a number; write a number, without quotes")
    return value


Number = Annotated[float, BeforeValidator(_as_number)]
PositiveFloat = Annotated[Number, Field(gt=0)]
NonNegativeFloat = Annotated[Number, Field(ge=0)]
Scale = Annotated[Number, Field(gt=0, ge=1 / MOST_SCALE, le=MOST_SCALE)]
"""A factor of tensors."""
PositiveInt = Annotated[int, BeforeValidator(_as_number), Field(gt=0, le=LARGEST)]
NonNegativeInt = Annotated[int, BeforeValidator(_as_number), Field(ge=0, le=LARGEST)]
Seed = NonNegativeInt
Size = Annotated[int, BeforeValidator(_as_number), Field(gt=0, le=MOST_SIZE)]
"""One dimension of a tensor."""
Loops = Annotated[int, BeforeValidator(_as_number), Field(gt=0, le=MOST_LOOPS)]
"""Passes through the core."""
Layers = Annotated[int, BeforeValidator(_as_number), Field(ge=0, le=MOST_LAYERS)]

C = TypeVar("C", bound=Config)


def parse(cls: type[C], data: Mapping[str, Any], *, source: str, overrides: Sequence[str] = ()) -> C:
    """Build `cls` from plain data with `a.b=value` overrides, or raise one ConfigError that names the key, the value
    and the mend.

    An override is text where the config wants text, whatever YAML would read it as: `data.path=2024-01-01`.
    """
    plain = apply_overrides(data, overrides)
    while True:
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            problems = error.errors(include_url=False)
        mended = plain
        for path in (_path(each, plain) for each in problems if each["type"] in ("string_type", "dict_type")):
            written, value = _as_written(overrides, path), _at(plain, path)
            if written and isinstance(written, str) and written != value and written[0] not in "[{":
                mended = _replaced(mended, path, written)
        if mended == plain:
            raise ConfigError(f"{source}: {_explain(cls, problems, plain)}") from None
        plain = mended


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
        names = [name for name in preset_names(kind) if name != path.stem]
        hint = f"{did_you_mean(base, names)} Presets: {', '.join(names)}."
        raise ConfigError(f"{path}: base {_shown(base)} is not a {kind} preset{hint}")
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
            merged[key] = _laid(below, value)
    return merged


def _laid(below: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    is_same_kind = "kind" not in over or over["kind"] == below.get("kind")
    return merge(below, over) if is_same_kind else dict(over)


def apply_overrides(data: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Apply `a.b=value` strings; values are read as YAML (`3`, `1e-3`, `true`, `[1, 2]`, `{kind: none}`). A key may
    have the place of a list's entry in it, from 0: `data.phases.0.n_rows=8`."""
    result = dict(data)
    for text in overrides:
        keys, value_text = _split(text)
        result = _laid_at(result, keys, _value(text, value_text), override=text)
    return result


def to_yaml(config: Config) -> str:
    """The resolved config as YAML, with every default written out."""
    return dump_yaml(config.model_dump(mode="json"))


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` where something close is known, else a full stop."""
    close = difflib.get_close_matches(str(word)[:100], list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


def _split(override: str) -> tuple[list[str], str]:
    """The keys and the value of an override."""
    key, separator, value = override.partition("=")
    keys = key.strip().split(".")
    if not separator or not all(keys):
        raise ConfigError(f"override {_shown(override)} is not of the form key.key=value")
    if len(keys) > MOST_LEVELS:
        raise ConfigError(f"override {_shown(override)} has {len(keys)} keys, and no config is as deep")
    return keys, value.strip()


def _value(override: str, text: str) -> Any:
    """The value of an override. A word is text wherever YAML gives it no other meaning."""
    try:
        value = parse_yaml(text)
    except ValueError as error:
        if text[:1] in "[{\"'":
            raise ConfigError(
                f"override {_shown(override)}: the value {_shown(text)} is not valid YAML ({error})"
            ) from None
        if text.isdecimal():
            raise ConfigError(f"override {_shown(override)}: {error}; no number is as large") from None
        return text
    is_quoted = text[:1] in ("'", '"')
    return text if isinstance(value, str) and not is_quoted else value  # `a #b` is no comment here


def _laid_at(below: Any, keys: Sequence[str], value: Any, *, override: str) -> Any:
    """`below` with `value` laid at the place that `keys` lead to, as `merge` lays it."""
    key, rest = keys[0], keys[1:]
    if isinstance(below, list):
        if not key.isdecimal() or int(key[:20]) >= len(below):
            raise ConfigError(
                f"override {_shown(override)}: {key!r} is no entry of a list of {len(below)}; they count from 0"
            )
        at, entries = int(key), dict(enumerate(below))
        entries[at] = _laid_at(below[at], rest, value, override=override) if rest else value
        return list(entries.values())
    mapping = below if isinstance(below, Mapping) else {}
    if not rest:
        return _laid(mapping, {key: value})
    return {**mapping, key: _laid_at(mapping.get(key), rest, value, override=override)}


def _as_written(overrides: Sequence[str], path: Sequence[int | str]) -> Any:
    """The text that the last override of what is at `path` was typed as; None if there was none."""
    found: Any = None
    for override in overrides:
        keys, text = _split(override)
        inside = [str(part) for part in path[len(keys) :]]
        if [str(part) for part in path[: len(keys)]] != keys:
            continue
        found = text
        try:
            found = _at(parse_yaml(text, as_written=True), inside) if inside else text
        except ValueError:
            found = None
    return found


def _at(data: Any, path: Sequence[int | str]) -> Any:
    """What is at a path; None if nothing is."""
    for part in path:
        if isinstance(data, Mapping):
            data = data.get(part)
        elif isinstance(data, list) and str(part).isdecimal() and int(part) < len(data):
            data = data[int(part)]
        else:
            return None
    return data


def _replaced(data: Any, path: Sequence[int | str], value: Any) -> Any:
    """`data` with another value at an existing path."""
    if not path:
        return value
    changed: Any = list(data) if isinstance(data, list) else dict(data)
    changed[path[0]] = _replaced(data[path[0]], path[1:], value)
    return changed


def _path(problem: ErrorDetails, data: Any) -> list[int | str]:
    """Where a problem is, in keys that can be typed. pydantic's own has the tags of unions and the names of types too:
    what is not in the data is left out, but for a key that is missing."""
    path: list[int | str] = []
    *before, last = problem["loc"] or ("",)
    for part in (*before, last):
        is_there = (isinstance(data, Mapping) and part in data) or (isinstance(data, list) and isinstance(part, int))
        if is_there:
            path.append(part)
            data = data[part]
    if problem["type"] == "missing":
        path.append(last)
    return path


def _explain(cls: type[BaseModel], problems: Sequence[ErrorDetails], data: Mapping[str, Any]) -> str:
    """One line for the first problem that pydantic found, with the number of further ones."""
    first = problems[0]
    path = _path(first, data)
    same = [each for each in problems if _path(each, data) == path]  # several, for the members of a union
    where = ".".join(map(str, path))
    if first["type"] == "extra_forbidden":
        known = _known_keys(cls, first["loc"][:-1])
        text = f"unknown key {_shown(where)}{did_you_mean(first['loc'][-1], known)}"
        if known:
            text += f" Known keys here: {', '.join(known)}."
    elif first["type"] == "missing":
        text = f"key {where!r} is required and not given."
    elif first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        text = _explain_kind(first, where)
    elif first["type"] == "value_error" and len(same) == 1:
        text = f"{where}: " * bool(where) + first["msg"].removeprefix("Value error, ")
    else:
        wanted = " or ".join(dict.fromkeys(map(_wanted, same)))
        words = [word for each in same for word in _quoted(each["msg"]) if each["type"] == "literal_error"]
        hint = did_you_mean(first["input"], words) if isinstance(first["input"], str) else "."
        should = f"Input should be {wanted}" if first["msg"].startswith("Input") or len(same) > 1 else wanted
        text = f"{where}: {should}, got {_shown(first['input'])}{hint}"
    n_others = len(problems) - len(same)
    return text if not n_others else f"{text} ({n_others} more problem{'s'[: n_others > 1]} after this one)"


def _explain_kind(problem: ErrorDetails, where: str) -> str:
    """Of a mapping whose `kind` says which keys it has."""
    context = problem.get("ctx", {})
    if problem["type"] == "union_tag_not_found":
        return f"key '{where}.kind' is required and not given."
    tag, known = str(context.get("tag", "")), _quoted(context.get("expected_tags", ""))
    return f"{where}: unknown kind {_shown(tag)}{did_you_mean(tag, known)} Known kinds: {', '.join(known)}."


def _wanted(problem: ErrorDetails) -> str:
    """What a value should be."""
    if problem["type"] in ("dict_type", "model_type", "model_attributes_type"):
        return "a mapping of keys to values"
    if problem["type"].startswith("bool"):
        return "true or false"
    if problem["type"] == "value_error":
        return "a number"
    bound = [value for name, value in problem.get("ctx", {}).items() if name in ("ge", "gt", "le", "lt")]
    text = problem["msg"].removeprefix("Input should be ")
    if bound and isinstance(bound[0], float):  # which pydantic writes out in full
        text = re.sub(r"[-0-9.e+]+$", f"{bound[0]:g}", text)
    return text


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _shown(value: Any) -> str:
    """A value for an error, not longer than a line holds."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:60]}...{text[-20:]} ({len(text):,} characters)"


def _known_keys(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """The keys of the (possibly tagged) config at `path` below `cls`."""
    options: list[Any] = [cls]
    for part in path:
        if isinstance(part, int):  # of a list, whose entries are all alike
            continue
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
