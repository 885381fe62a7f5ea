"""The text of one record: a field, a conversation, or a question with its answer.

Nothing is passed over in silence. A record that cannot be read whole is left out and counted by its reason. A part of a
message that is no text (an image, a tool call) is counted, and the message keeps its other parts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from looplm.errors import ConfigError

TEXT_FIELDS = ("text", "content")
TURNS = ("messages", "conversations")
ASKED = ("instruction", "question", "input", "output", "answer")
TEXT_PARTS = (None, "text", "input_text", "output_text")  # by the `type` of a part
PARTS = "parts of type"  # how the reasons begin that count parts of a record, not records


class Skipped(Counter[str]):
    """How many documents, or parts of them, were left out, by reason."""

    def __str__(self) -> str:
        return ", ".join(f"{number:,} {reason}" for reason, number in self.most_common())

    def lines(self) -> list[str]:
        """The same, a line a reason."""
        return [
            f"left out: {number:,} {'' if reason.startswith(PARTS) else 'documents, '}{reason}"
            for reason, number in self.most_common()
        ]


def check_field(field: str | None) -> None:
    """Refuse names of fields that name nothing.

    Raises:
        ConfigError: a name is empty.
    """
    if field is not None and not all(name.strip() for name in field.split(",")):
        raise ConfigError(f"field {field!r} has an empty name; give one field, or several as question,answer")


def record_text(record: Any, *, field: str | None = None, skipped: Skipped | None = None) -> str | None:
    """The text of one record. None where it has none; `skipped` then counts the reason.

    `field` names the fields to read, several separated by commas: a line each. Without it these are tried in turn: text
    or content, a conversation, a question with its answer. A conversation becomes a line a turn, `role: content`.
    """
    counted = Skipped() if skipped is None else skipped
    try:
        return _usual(record, counted) if field is None else _named(record, field, counted)
    except _UnusableError as why:
        counted[str(why)] += 1
        return None


class _UnusableError(Exception):
    """Why a record is left out."""


def _named(record: Any, field: str, counted: Skipped) -> str:
    texts = []
    for name in map(str.strip, field.split(",")):
        value = record.get(name) if isinstance(record, Mapping) else None
        if value is None:
            raise _UnusableError(f"without {name}")
        is_conversation = isinstance(value, list) and value and all(map(_is_turn, value))
        text = _conversation(value, counted) if is_conversation else _content(value, counted)
        if text is None:
            raise _UnusableError(f"without {name} as text")
        texts.append(text)
    return "\n".join(text for text in texts if text) if len(texts) > 1 else texts[0]


def _usual(record: Any, counted: Skipped) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping):
        raise _UnusableError("without text")
    for name in TEXT_FIELDS:
        if isinstance(record.get(name), str):
            return str(record[name])
    turns = next((record[name] for name in TURNS if record.get(name)), None)
    if isinstance(turns, list) and all(isinstance(turn, Mapping) for turn in turns):
        return _conversation(turns, counted)
    asked = _asked(record, counted)
    if asked is not None:
        return asked
    unread = next((name for name in (*TEXT_FIELDS, *TURNS) if record.get(name)), None)
    text = _content(record[unread], counted) if unread in TEXT_FIELDS else None
    if text is None:
        raise _UnusableError("without text" if unread is None else f"without {unread} as text")
    return text


def _asked(record: Mapping[str, Any], counted: Skipped) -> str | None:
    """A question and its answer, by whatever names; None where there are not two of them."""
    given = {name: record[name] for name in ASKED if record.get(name) not in (None, "", [], {})}
    if len(given) < 2:
        return None
    texts = {name: _content(value, counted) for name, value in given.items()}
    for name, text in texts.items():
        if text is None:
            raise _UnusableError(f"without {name} as text")
    return "\n".join(text for text in texts.values() if text)


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _conversation(turns: Sequence[Mapping[str, Any]], counted: Skipped) -> str:
    """A line a turn. Without one of its turns a conversation would answer what nobody asked: it is left out whole."""
    lines = []
    for turn in turns:
        role, content = (
            next((turn[name] for name in names if turn.get(name) is not None), None)
            for names in (("role", "from"), ("content", "value"))
        )
        text = _content(content, counted)
        if not isinstance(role, str):
            raise _UnusableError("with a turn without role")
        if text is None:
            raise _UnusableError("with a turn without text")
        lines.append(f"{role}: {text}")
    return "\n".join(lines)


def _content(value: Any, counted: Skipped) -> str | None:
    """A text, or the text parts of a message, a line each; None where there is none."""
    if isinstance(value, str):
        return value
    parts = [value] if isinstance(value, Mapping) else value
    if not isinstance(parts, list):
        return None
    return "\n".join(text for part in parts if (text := _part(part, counted))) or None


def _part(part: Any, counted: Skipped) -> str | None:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
    counted[f"{PARTS} {str(kind)[:40]!r}"] += 1
    return None
