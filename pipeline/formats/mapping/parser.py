"""The fast way from JSON to a report by a mapping: only what it names is decoded, into structs made for it.

The decoded struct serves as the report, and those inside as its entries; what is not in its final place or form is set
afterwards. To make other objects of them would take as long as decoding.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Annotated, Any, Final, NamedTuple

import msgspec
from msgspec import NODEFAULT, UNSET

from pipeline.core.report import Entry, Report, Timestamp
from pipeline.errors import DecodeError
from pipeline.formats.mapping.config import MappingConfig
from pipeline.formats.mapping.fields import fields_and_head
from pipeline.formats.mapping.structs import (
    HEAD,
    NoFastWay,
    Slot,
    getter,
    head_setter,
    inside_getter,
    make_struct,
    steps_of,
)
from pipeline.formats.mapping.texts import id_text, text_of, value_text
from pipeline.formats.mapping.times import time_reader

_Parse = Callable[[bytes], Report]
# What a report and an entry have, with what stands there until it is set.
_REPORT: Final = {"agent_id": "", "entries": None, "collected_at": None}
_ENTRY: Final = {"key": "", "value": "", "error": "", "collected_at": None}
_Id = Annotated[str, msgspec.Meta(min_length=1)] | int


def compile_parser(config: MappingConfig) -> _Parse | None:
    """Return the parser of a mapping; see CompiledMapping.parse."""
    try:
        return _Compiler(config).parser()
    except NoFastWay:
        return None


class _Head(NamedTuple):
    """What is decoded besides the entries, and `set`, which gives a report its agent and time.

    Shape: set(report, fields), where `fields` is the object whose fields are the keys, if the mapping has one. `set` is
    None if both are decoded in their place.
    """

    decode: Callable[[bytes], Any]
    places: dict[str, str]
    set: Callable[[Any, Any], None] | None


class _Compiler:
    def __init__(self, config: MappingConfig) -> None:
        self._config = config
        self._has_error = config.error is not None
        self._read_time = time_reader(config.time_format)
        self._is_rfc3339 = config.time_format == "rfc3339"
        self._time_type: Any = Timestamp | None if self._is_rfc3339 else int | float | str | None
        self._keep: Callable[[str], bool] | None = None
        if config.include is not None:
            self._keep = frozenset(config.include).__contains__
        elif config.left_out:
            left_out = config.left_out
            self._keep = lambda key: key not in left_out

    def parser(self) -> _Parse:
        config = self._config
        if config.entries is None:
            return self._one_entry()
        if config.key is not None:
            return self._listed()
        if config.value is not None:
            raise NoFastWay  # each of the entries may be a value or an object
        return self._fields() if config.include is None else self._included(config.include)

    def _listed(self) -> _Parse:  # noqa: C901  # calls would cost more than the work
        """Entries are a list of objects, which become the entries."""
        slots = self._key_and_value()
        has_time = self._config.entry_time is not None
        if has_time:
            slots.append(Slot("collected_at", steps_of(self._config.path("entry_time")), self._time_type, None))
        entry_type, places = make_struct(slots, _ENTRY)
        moves = [(slot.name, getter(slot, places)) for slot in slots if places[slot.name] != slot.name]
        entries_type: Any = list[entry_type]  # type: ignore[valid-type]
        slot = Slot("entries", steps_of(self._config.path("entries")), entries_type)
        decode, places, set_head = self._head([slot])
        entries_of = None if places["entries"] == "entries" else getter(slot, places)
        has_error, keep, read_time = self._has_error, self._keep, self._read_time
        is_rare = bool(moves or has_time or keep)

        def parse(raw: bytes) -> Report:
            report = decode(raw)
            if set_head is not None:
                set_head(report, None)
            elif report.agent_id.__class__ is not str:
                report.agent_id = str(report.agent_id)
            if entries_of is not None:
                report.entries = entries_of(report)
            if is_rare:
                set_rare(report)
            for entry in report.entries:
                value = entry.value
                if value.__class__ is not str:
                    entry.value = value_text(value, entry)
                if has_error and entry.error.__class__ is not str:
                    entry.error = text_of(entry.error)
            return report  # type: ignore[no-any-return]  # a struct with a report's fields

        def set_rare(report: Any) -> None:
            for entry in report.entries:
                for name, get in moves:
                    setattr(entry, name, get(entry))
                if has_time and entry.collected_at is not None:
                    entry.collected_at = read_time(entry.collected_at)
            if keep is not None:
                report.entries = [entry for entry in report.entries if keep(entry.key)]

        return parse

    def _fields(self) -> _Parse:
        """Entries are all fields of an object but some."""
        steps = steps_of(self._config.path("entries"), may_be_root=True)
        left_out = tuple(self._config.left_out)
        if not steps:
            return self._root_fields()
        slot = Slot("entries", steps, dict[str, Any])
        decode, places, set_head = self._head([slot], steps)
        fields_of = None if places["entries"] == "entries" else getter(slot, places)
        if parent := self._parent_of_head(places):
            head_of = None if parent == HEAD else attrgetter(parent)
            return fields_and_head(decode, head_of, fields_of, left_out)

        def parse(raw: bytes) -> Report:
            report = decode(raw)
            fields = report.entries if fields_of is None else fields_of(report)
            if set_head is not None:
                set_head(report, fields)
            elif report.agent_id.__class__ is not str:
                report.agent_id = str(report.agent_id)
            if left_out:
                for name in left_out:
                    fields.pop(name, None)
            report.entries = entries = []
            for key, value in fields.items():
                entries.append(Entry(key, value if value.__class__ is str else text_of(value)))
            return report  # type: ignore[no-any-return]  # a struct with a report's fields

        return parse

    def _parent_of_head(self, places: dict[str, str]) -> str | None:
        """Return where the object is that holds the id, a single one, and the time, a moment, if there is one."""
        parent = places.get("agent_id", "").rpartition(".")[0]
        if self._config.time not in (None, "record:timestamp"):  # else each report has the record's
            is_beside = places.get("collected_at") == f"{parent}.collected_at"
            return parent if is_beside and self._is_rfc3339 else None
        return parent

    def _root_fields(self) -> _Parse:
        """Entries are all fields of the record's value but some."""
        _, _, set_head = self._head([], ())
        assert set_head is not None
        decode = msgspec.json.Decoder(dict[str, Any]).decode
        left_out = tuple(self._config.left_out)

        def parse(raw: bytes) -> Report:
            fields = decode(raw)
            report = Report("", [])
            set_head(report, fields)
            for name in left_out:
                fields.pop(name, None)
            for key, value in fields.items():
                report.entries.append(Entry(key, value if value.__class__ is str else text_of(value)))
            return report

        return parse

    def _included(self, include: list[str]) -> _Parse:
        """Entries are some fields of an object."""
        steps = steps_of(self._config.path("entries"), may_be_root=True)
        slots = [Slot(f"i{number}", (*steps, name), Any, UNSET) for number, name in enumerate(include)]
        decode, places, set_head = self._head(slots)
        getters = [(name, attrgetter(places[slot.name])) for name, slot in zip(include, slots, strict=True)]

        def parse(raw: bytes) -> Report:
            report = decode(raw)
            if set_head is not None:
                set_head(report, None)
            elif report.agent_id.__class__ is not str:
                report.agent_id = str(report.agent_id)
            report.entries = entries = []
            try:
                for key, get in getters:
                    value = get(report)
                    if value is not UNSET:
                        entries.append(Entry(key, value if value.__class__ is str else text_of(value)))
            except AttributeError:
                raise DecodeError("the object with the entries is missing") from None
            return report  # type: ignore[no-any-return]  # a struct with a report's fields

        return parse

    def _one_entry(self) -> _Parse:
        """Each record is an entry."""
        slots = self._key_and_value()
        decode, places, set_head = self._head(slots)
        get_key, get_value = (getter(slot, places) for slot in slots[:2])
        get_error = getter(slots[2], places) if self._has_error else None
        keep = self._keep

        def parse(raw: bytes) -> Report:
            report = decode(raw)
            if set_head is not None:
                set_head(report, None)
            elif report.agent_id.__class__ is not str:
                report.agent_id = str(report.agent_id)
            value = get_value(report)
            entry = Entry(get_key(report), value)
            if get_error is not None:
                entry.error = text_of(get_error(report))
            if value.__class__ is not str:
                entry.value = value_text(value, entry)
            report.entries = [entry] if keep is None or keep(entry.key) else []
            return report  # type: ignore[no-any-return]  # a struct with a report's fields

        return parse

    def _key_and_value(self) -> list[Slot]:
        slots = [
            Slot("key", steps_of(self._config.path("key")), str),
            Slot("value", steps_of(self._config.path("value")), Any, UNSET if self._has_error else NODEFAULT),
        ]
        return [*slots, Slot("error", steps_of(self._config.path("error")), Any, "")] if self._has_error else slots

    def _head(self, slots: list[Slot], fields: tuple[str, ...] | None = None) -> _Head:
        """Return how to decode these slots, the id and the time; those inside the object `fields` are found in it."""
        ids, time = self._config.id_paths, self._config.path("time")
        names = ["agent_id"] if len(ids) == 1 else [f"id{number}" for number in range(len(ids))]
        head = [Slot(name, steps_of(path), _Id) for name, path in zip(names, ids, strict=True)]
        if time is not None and time.source != "timestamp":
            head.append(Slot("collected_at", steps_of(time), self._time_type, None))
        inside = [slot for slot in head if fields is not None and slot.steps[: len(fields)] == fields]
        outside = [slot for slot in head if slot not in inside]
        report_type, places = make_struct([*slots, *outside], _REPORT)
        decode = msgspec.json.Decoder(report_type).decode
        is_in_place = all(places.get(slot.name) == slot.name for slot in head)
        if is_in_place and len(ids) == 1 and (self._is_rfc3339 or len(head) == 1):
            return _Head(decode, places, None)
        if not inside and len(ids) == 1 and (usual := head_setter(head, places, is_moment=self._is_rfc3339)):
            return _Head(decode, places, usual)
        getters = [
            (slot in inside, inside_getter(slot, len(fields or ())) if slot in inside else getter(slot, places))
            for slot in head
        ]
        id_getters, time_getters = getters[: len(ids)], getters[len(ids) :]
        id_is_inside, get_id = id_getters[0]
        is_single, separator = len(ids) == 1, self._config.id_separator
        time_is_inside, get_time = time_getters[0] if time_getters else (False, None)
        is_moment, read_time = self._is_rfc3339 and not time_is_inside, self._read_time

        def set_head(report: Any, fields: Any) -> None:
            if is_single:
                agent_id = get_id(fields if id_is_inside else report)
            else:
                found = [get(fields if is_inside else report) for is_inside, get in id_getters]
                agent_id = separator.join([id_text(part) for part in found])
            report.agent_id = agent_id if agent_id.__class__ is str and agent_id else id_text(agent_id)
            if get_time is not None:
                moment = get_time(fields if time_is_inside else report)
                report.collected_at = moment if is_moment or moment is None else read_time(moment)

        return _Head(decode, places, set_head)
