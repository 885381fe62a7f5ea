"""Text, JSON and YAML files, read with one clear error that names the file, whatever it holds.

Everything that reads such a file reads it here. Nothing is imported for it but json and yaml, so commands start fast.
"""

import json
import re
import stat
from pathlib import Path
from typing import Any

import yaml

from looplm.errors import ConfigError, LooplmError

MIB = 1 << 20
MOST_BYTES = 64 * MIB  # of a file that is read whole, where its reader gives no other limit
MOST_LEVELS = 100  # of lists and mappings inside one another; json's own limit hangs on the caller's stack
MOST_YAML_BYTES = MIB  # read in Python, a second or two of it
MOST_YAML_NODES = 100_000  # with every alias written out: nine lines can stand for billions
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
MOST_DIGITS = 100  # of a whole number
_WHOLE = re.compile(r"[-+]?[0-9][0-9_]*")
_HEXADECIMAL = re.compile(r"[-+]?0[xX][0-9a-fA-F_]+")
_DECIMAL = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?")
_WORDS = {
    **dict.fromkeys(("true", "yes", "on"), True),
    **dict.fromkeys(("false", "no", "off"), False),
    **dict.fromkeys(("null", "~", "")),
    **{sign + ".inf": float(sign + "inf") for sign in ("", "+", "-")},
    ".nan": float("nan"),
}


def read_bytes(
    path: Path, *, what: str = "file", most: int = MOST_BYTES, error: type[LooplmError] = ConfigError
) -> bytes:
    """All bytes of a regular file of at most `most` bytes. Devices and pipes are refused: they may never end.

    Raises:
        error: `what` at `path` cannot be read; one line that names it.
    """
    name = f"{what} {str(path)!r} cannot be read"
    try:
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise error(f"{name}: it is a folder; give a file")
        if not stat.S_ISREG(found.st_mode):
            raise error(f"{name}: it is a device or a pipe; write it to a file first")
        if found.st_size > most:
            raise error(
                f"{name}: it has {found.st_size:,} bytes, and no more than {most:,} are read; is it another file?"
            )
        return path.read_bytes()
    except FileNotFoundError:
        raise error(f"{name}: it does not exist") from None
    except (OSError, ValueError) as reason:  # ValueError: a zero byte in the path
        raise error(f"{name} ({getattr(reason, 'strerror', None) or reason})") from None


def read_text(path: Path, *, what: str = "file", most: int = MOST_BYTES, error: type[LooplmError] = ConfigError) -> str:
    """All of a UTF-8 file, without its byte order mark, as `read_bytes` reads it."""
    data = read_bytes(path, what=what, most=most, error=error)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        where = f"byte {data[reason.start]:#04x} at {reason.start:,}"
        raise error(f"{what} {str(path)!r} cannot be read: it is not UTF-8 ({where}); save it as UTF-8") from None


def read_json(
    path: Path, *, what: str = "file", most: int = MOST_BYTES, error: type[LooplmError] = ConfigError
) -> dict[str, Any]:
    """The JSON object that a file holds, as `read_text` reads it."""
    text = read_text(path, what=what, most=most, error=error)
    try:
        data = parse_json(text)
    except ValueError as reason:
        raise error(f"{what} {str(path)!r} cannot be read as JSON ({reason})") from None
    if not isinstance(data, dict):
        raise error(f"{what} {str(path)!r} must hold an object of keys and values, not {kind_of(data)}")
    return data


def parse_json(text: str | bytes) -> Any:
    """What a JSON text or line says. Unlike json.loads it refuses what would fail later and elsewhere: a key that is
    given twice, half a surrogate pair, more than MOST_LEVELS levels.

    Raises:
        UnicodeError: bytes that are not UTF-8, half a surrogate pair.
        ValueError: everything else that cannot be read, a line saying what. (A UnicodeError is one too.)
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    try:
        data = json.loads(text, object_pairs_hook=_without_repeats, parse_int=_whole)
    except RecursionError:
        raise ValueError(f"more than {MOST_LEVELS} levels") from None
    except json.JSONDecodeError as error:
        if not text.strip():
            raise ValueError("it is empty") from None
        where = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"{error.msg}, {where}column {error.colno}") from None
    # both checks walk through all values, so only where the text gives reason to
    if text.count("[") + text.count("{") > MOST_LEVELS:
        _check_levels(data)
    if _HALF_PAIR.search(text) or not text.isascii():
        _check_text(data)
    return data


def read_yaml(path: Path, *, what: str = "config file", error: type[LooplmError] = ConfigError) -> dict[str, Any]:
    """The YAML mapping that a file holds, as `read_text` reads it."""
    text = read_text(path, what=what, most=MOST_YAML_BYTES, error=error)
    try:
        data = parse_yaml(text)
    except ValueError as reason:
        raise error(f"{what} {str(path)!r} cannot be read as YAML ({reason})") from None
    if not isinstance(data, dict):
        raise error(f"{what} {str(path)!r} must hold a mapping of keys to values, not {kind_of(data)}")
    return data


def parse_yaml(text: str, *, as_written: bool = False) -> Any:
    """What a YAML text says. Unlike yaml.safe_load it reads `1e-3` as a number, `010` as ten, and `2024-01-01` and
    `12:30` as text; keys are text always. It refuses a key that is given twice, tags, and what is nested or repeated by
    aliases beyond all use. With `as_written` scalars stay the text that they are written as.

    Raises:
        ValueError: a line saying what cannot be read.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        return None if node is None else _Builder(as_written=as_written).build(node, level=0)
    except yaml.YAMLError as error:
        raise ValueError(_yaml_reason(error)) from None
    except RecursionError:
        raise ValueError(f"more than {MOST_LEVELS} levels") from None


def dump_yaml(data: Any) -> str:
    """YAML that `parse_yaml` reads as `data`, and so does every other reader."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=120)


def kind_of(value: Any) -> str:
    """What a value read from JSON or YAML is called in an error."""
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "true or false", type(None): "nothing"}
    return kinds.get(type(value), "a number")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"key {twice[:40]!r} is given twice")
    return found


def _check_levels(data: Any) -> None:
    level = [data]
    for _ in range(MOST_LEVELS + 1):
        level = [each for each in level if isinstance(each, dict | list)]
        level = [value for each in level for value in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return
    raise ValueError(f"more than {MOST_LEVELS} levels")


def _check_text(data: Any) -> None:
    """Refuse half of a surrogate pair, which has no bytes in UTF-8, in any text or key."""
    left = [data]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            left += [*value, *value.values()]
        elif isinstance(value, list):
            left += value
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UnicodeError("half of a surrogate pair") from None


class _Loader(yaml.SafeLoader):
    """Makes nodes of a text; what a scalar means is `_scalar`'s."""

    DEFAULT_SCALAR_TAG = "scalar"  # type: ignore[misc]  # a node without a tag
    TEXT_TAG = "tag:yaml.org,2002:str"
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012, as the class above has it

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:
        # here, not at a node: what reads tokens looks a thousand brackets ahead, in time that grows as their square
        if self.flow_level >= MOST_LEVELS:
            raise yaml.YAMLError(f"more than {MOST_LEVELS} levels")
        super().fetch_flow_collection_start(TokenClass)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that would be read as something else."""

    def represent_text(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if _scalar(data) is data else "'")


_Dumper.add_representer(str, _Dumper.represent_text)


class _Builder:
    """Plain data from the nodes of one text."""

    def __init__(self, *, as_written: bool) -> None:
        self.as_written = as_written
        self.n_nodes = 0

    def build(self, node: yaml.Node, *, level: int) -> Any:
        self.n_nodes += 1
        if self.n_nodes > MOST_YAML_NODES:
            raise ValueError(f"more than {MOST_YAML_NODES:,} values, aliases written out")
        if level > MOST_LEVELS:  # also an alias inside what it stands for
            raise ValueError(f"more than {MOST_LEVELS} levels")
        if isinstance(node, yaml.ScalarNode) and node.tag in (_Loader.DEFAULT_SCALAR_TAG, _Loader.TEXT_TAG):
            is_plain = node.style is None and node.tag == _Loader.DEFAULT_SCALAR_TAG
            return _scalar(node.value) if is_plain and not self.as_written else node.value
        if isinstance(node, yaml.SequenceNode) and node.tag == _Loader.DEFAULT_SEQUENCE_TAG:
            return [self.build(value, level=level + 1) for value in node.value]
        if isinstance(node, yaml.MappingNode) and node.tag == _Loader.DEFAULT_MAPPING_TAG:
            return self._mapping(node, level=level)
        raise ValueError(f"line {node.start_mark.line + 1}: tag {node.tag[:40]!r} is not read; write plain values")

    def _mapping(self, node: yaml.MappingNode, *, level: int) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ValueError(f"line {line}: a key must be plain text")
            key, value = str(key_node.value), self.build(value_node, level=level + 1)
            if key in own:
                raise ValueError(f"line {line}: key {key[:40]!r} is given twice")
            if key != "<<":
                own[key] = value
                continue
            for each in reversed(value if isinstance(value, list) else [value]):
                if not isinstance(each, dict):
                    raise ValueError(f"line {line}: << takes a mapping or a list of them")
                merged |= each
        return merged | own


def _scalar(text: str) -> Any:
    """What an unquoted word means."""
    word = text.lower()
    if word in _WORDS and text in (word, word.capitalize(), word.upper()):
        return _WORDS[word]
    is_hexadecimal = _HEXADECIMAL.fullmatch(text) is not None
    if is_hexadecimal or _WHOLE.fullmatch(text):
        return _whole(text, base=16 if is_hexadecimal else 10) if "__" not in text and text[-1] != "_" else text
    return float(text.replace("_", "")) if _DECIMAL.fullmatch(text) else text


def _whole(text: str, *, base: int = 10) -> int:
    if len(text) > MOST_DIGITS:  # Python prints no more than 4,300, and nothing here needs more than 20
        raise ValueError(f"a number of {len(text):,} digits")
    return int(text, base)


def _yaml_reason(error: yaml.YAMLError) -> str:
    """The first line of what yaml says, with the line of the text it is about."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {' '.join(str(error.problem).split())[:200]}"
    return str(error).splitlines()[0][:200]
