"""Where a value is in a record: parsed once, then followed in objects and lists."""

from __future__ import annotations

import re
from enum import Enum
from typing import Final, Literal, NamedTuple

from pipeline.core.record import Record
from pipeline.errors import DecodeError

_STEP: Final = re.compile(r'"([^"]+)"|([^".]+)')
_UNQUOTABLE: Final = re.compile(r"[\[\]:\s]")


class Missing(Enum):
    """Why a path leads to nothing."""

    ABSENT = "missing"
    NULL_ABOVE = "below null"


class Path(NamedTuple):
    """Where a value is: the names, or a list's indexes, that lead to it in the record's value; none mean all of it.

    With another `source`, the value is outside of the record's value: a header (whose name is the only step), the
    record key, or the record's timestamp.
    """

    text: str
    steps: tuple[str, ...] = ()
    source: Literal["value", "header", "key", "timestamp"] = "value"

    def __str__(self) -> str:
        return self.text

    def find(self, value: object) -> object:
        """Follow the steps from an object that holds it; return what is there, None for null, or a Missing."""
        for step in self.steps:
            if isinstance(value, dict):
                value = value.get(step, Missing.ABSENT)
            elif isinstance(value, list | tuple) and step.isdecimal() and int(step) < len(value):
                value = value[int(step)]
            else:
                return Missing.NULL_ABOVE if value is None else Missing.ABSENT
        return value

    def read(self, value: object, record: Record) -> object:
        """Return what is there in a record, `value` being its decoded value; see find().

        Raises:
            DecodeError: a header or the record key is not UTF-8.
        """
        if self.source == "value":
            return self.find(value)
        if self.source == "timestamp":
            return Missing.ABSENT  # a report without a time has the record's
        raw = record.key
        if self.source == "header":
            raw = next((text for name, text in reversed(record.headers) if name == self.steps[0]), None)
        if raw is None:
            return Missing.ABSENT
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise DecodeError(f"{self} is not UTF-8: {raw[:64]!r}") from None


def parse_path(text: str) -> Path:
    """Parse a path as operators write it: `a.b`, `a."name.with.dots"`, `a.0`, `.`, `header:NAME`, `record:key`.

    Raises:
        ValueError: it is none; the message says how to write it.
    """
    if text.startswith("header:"):
        if not (name := text.removeprefix("header:")):
            raise ValueError("header: lacks the header's name")
        return Path(text, (name,), "header")
    if text == "record:key":
        return Path(text, (), "key")
    if text == "record:timestamp":
        return Path(text, (), "timestamp")
    if text == ".":
        return Path(text)
    steps: list[str] = []
    end = 0
    while match := _STEP.match(text, end):
        quoted, bare = match.groups()
        if bare is not None and (_UNQUOTABLE.search(bare) or bare.startswith("$")):
            break
        steps.append(quoted if bare is None else bare)
        end = match.end()
        if end == len(text):
            return Path(text, tuple(steps))
        if text[end] != ".":
            break
        end += 1
    raise ValueError(
        "is not a path: write names with dots between them, such as data.name; a list's index as data.0.name; a name "
        """with other signs than letters, digits, - and _ in quotes, data."host.name"; . for the whole value; or """
        "header:NAME, record:key, record:timestamp"
    )
