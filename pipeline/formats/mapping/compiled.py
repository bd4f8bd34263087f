"""A mapping, compiled: from an object of any format, or from JSON, to a report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Final, NamedTuple

from pipeline.core.record import Record
from pipeline.core.report import PARSE_ERRORS, Entry, Report
from pipeline.core.values import as_text
from pipeline.errors import DecodeError
from pipeline.formats.mapping.config import MappingConfig
from pipeline.formats.mapping.parser import compile_parser
from pipeline.formats.mapping.paths import Missing, Path
from pipeline.formats.mapping.times import time_reader
from pipeline.formats.schemas import read_json

_Containers: Final = dict | list | tuple


class _Element(NamedTuple):
    """An entry that is not read yet: where it is, for errors, its key, and the object that has its value."""

    where: str
    key: str
    holder: object


class CompiledMapping:
    """Reads reports out of foreign records as a MappingConfig says.

    `parse` is the fast way for JSON: from the bytes of a record's value to a report, or to one of PARSE_ERRORS,
    KeyError or DecodeError for whatever is not plain, about which `reports` decides. It is None if the mapping needs
    more than the value, or a list's index.
    Guarantee: what `parse` returns is what `reports` would return, and is within the limits if the value has at most
    SHORT_BYTES and no backslash. Only `parse` takes a value that is no JSON in a part that the mapping does not name.
    """

    def __init__(self, config: MappingConfig) -> None:
        self.parse: Callable[[bytes], Report] | None = compile_parser(config)
        self._ids, self._separator = config.id_paths, config.id_separator
        self._time, self._entry_time = config.path("time"), config.path("entry_time")
        self._read_time = time_reader(config.time_format)
        self._entries, self._key = config.path("entries"), config.path("key")
        self._value, self._error = config.path("value"), config.path("error")
        self._include, self._exclude = config.include, config.left_out

    def decode(self, raw: bytes | None, record: Record) -> list[Report]:
        """Return the reports in JSON, by `parse` or else by `reports`; they are not within the limits yet.

        Guarantee: a record becomes the same whether or not a reader has tried `parse` before.

        Raises:
            DecodeError: it is not JSON, or see `reports`.
        """
        if raw is None:
            return []
        if self.parse is not None:
            with contextlib.suppress(*PARSE_ERRORS, KeyError, DecodeError):
                return [self.parse(raw)]
        return self.reports(read_json(raw), record)

    def reports(self, value: object, record: Record) -> list[Report]:
        """Return the reports in a record, `value` being its decoded value: one, or none for a tombstone or a delete.

        They are not within the limits yet (see report.apply_limits).

        Raises:
            DecodeError: the mapping does not fit; the message names the field of the mapping, and its path.
        """
        elements = None if value is None else self._elements(value, record)
        if elements is None:
            return []
        agent_id = self._separator.join([self._id(path, value, record) for path in self._ids])
        moment = self._moment("time", self._time, "", value, record)
        return [Report(agent_id, [self._entry(element, record) for element in elements], moment)]

    def _elements(self, value: object, record: Record) -> list[_Element] | None:
        """Return the entries that are not left out; None if null is where they should be, as after a delete."""
        found: object
        if self._entries is None:
            found = self._key.read(value, record) if self._key else None
            if found is Missing.NULL_ABOVE:
                return None
            elements = [_Element("", self._checked_key(found, ""), value)]
        else:
            found = self._entries.find(value)
            if found is None or found is Missing.NULL_ABOVE:
                return None
            elements = list(self._fields(found) if self._key is None else self._listed(found))
        if self._include is not None:
            return [element for element in elements if element.key in self._include]
        return [element for element in elements if element.key not in self._exclude]

    def _fields(self, found: object) -> Iterator[_Element]:
        if not isinstance(found, dict):
            raise _misfit("entries", self._entries, f"{_kind(found)}, not an object")
        for key in found if self._include is None else [name for name in self._include if name in found]:
            yield _Element(f"[{key!r}]", self._checked_key(key, ""), found[key])

    def _listed(self, found: object) -> Iterator[_Element]:
        if not isinstance(found, list | tuple):
            raise _misfit("entries", self._entries, f"{_kind(found)}, not a list")
        for index, item in enumerate(found):
            where = f"[{index}]"
            if not isinstance(item, _Containers):
                raise _misfit("entries", self._entries, f"{where} is {_kind(item)}, not an object")
            key = self._key.find(item) if self._key else None
            yield _Element(where, self._checked_key(key, where), item)

    def _checked_key(self, key: object, where: str) -> str:
        if key is None or isinstance(key, Missing | _Containers):
            raise _misfit("key", self._key, _kind(key), where)
        return _text("key", self._key, key, where)

    def _entry(self, element: _Element, record: Record) -> Entry:
        where, key, holder = element
        if self._value is None or (self._entries and not self._key and not isinstance(holder, _Containers)):
            return Entry(key, _text("entries", self._entries, holder, where))
        value = self._value.read(holder, record)
        error = None if self._error is None else self._error.read(holder, record)
        text = "" if error is None or isinstance(error, Missing) else _text("error", self._error, error, where)
        if value is Missing.ABSENT and not text:
            raise _misfit("value", self._value, _kind(value), where)
        shown = "" if isinstance(value, Missing) else _text("value", self._value, value, where)
        return Entry(key, shown, text, self._moment("entry_time", self._entry_time, where, holder, record))

    def _id(self, path: Path, value: object, record: Record) -> str:
        found = path.read(value, record)
        if found is None or found == "" or isinstance(found, Missing | _Containers | bool):
            raise _misfit("id", path, _kind(found))
        return _text("id", path, found)

    def _moment(self, field: str, path: Path | None, where: str, holder: object, record: Record) -> datetime | None:
        found = None if path is None else path.read(holder, record)
        if found is None or isinstance(found, Missing):
            return None
        try:
            return self._read_time(found)
        except DecodeError as error:
            raise _misfit(field, path, str(error), where) from None


def _misfit(field: str, path: Path | None, found: str, where: str = "") -> DecodeError:
    """Say which field of the mapping does not fit, and what was found at its path; `where` is which of the entries."""
    inside = f" in {where}" if where else ""
    return DecodeError(f"the record does not fit [mapping]: {field}, at {path}{inside}: {found}")


def _kind(found: object) -> str:
    if isinstance(found, Missing):
        return found.value
    if found is None:
        return "null"
    if isinstance(found, dict):
        return "an object"
    if isinstance(found, list | tuple):
        return "a list"
    return f"{found!r:.64}"


def _text(field: str, path: Path | None, value: object, where: str = "") -> str:
    try:
        return as_text(value)
    except (*PARSE_ERRORS, ValueError) as error:
        raise _misfit(field, path, f"has no text: {error}", where) from None
