"""Messages of Protobuf as plain Python values; what it is for a schema is decided once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from pipeline.formats.floats import shortest
from pipeline.formats.reports import timestamp_moment

Convert = Callable[[Any], object]


def converter(message: Any) -> Convert:
    """Return what converts messages of this descriptor into dicts of their fields, by the names in the schema.

    A field without presence is there with its default, one with presence only if it is set; an enum is its name, a map
    a dict. Google's well-known types are what they mean: a Timestamp is a datetime, a Struct a dict.
    """
    return _converter(message, {})


def _converter(message: Any, known: dict[str, Convert]) -> Convert:
    special = _WELL_KNOWN.get(message.full_name)
    if special is not None:
        return special
    if message.full_name in known:
        return known[message.full_name]
    always: list[tuple[str, Convert | None]] = []
    present: list[tuple[str, Convert | None]] = []

    def convert(value: Any) -> object:
        fields: dict[str, object] = {}
        for name, inner in always:
            content = getattr(value, name)
            fields[name] = content if inner is None else inner(content)
        for name, inner in present:
            if value.HasField(name):
                content = getattr(value, name)
                fields[name] = content if inner is None else inner(content)
        return fields

    known[message.full_name] = convert  # before its fields: a message may contain itself
    for field in message.fields:
        (present if field.has_presence else always).append((field.name, _field_converter(field, known)))
    return convert


def _field_converter(field: Any, known: dict[str, Convert]) -> Convert | None:
    """Return what converts a field's content; None where it is a plain value already."""
    if not field.is_repeated:
        return _value_converter(field, known)
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        inner = _value_converter(field.message_type.fields_by_name["value"], known) or _unchanged
        return lambda items: {_map_key(key): inner(items[key]) for key in items}
    item = _value_converter(field, known)
    return list if item is None else lambda items: [item(value) for value in items]


def _value_converter(field: Any, known: dict[str, Convert]) -> Convert | None:
    if field.message_type is not None:
        return _converter(field.message_type, known)
    if field.enum_type is not None:
        names = {value.number: value.name for value in field.enum_type.values}
        return lambda number: names.get(number, number)
    return shortest if field.type == field.TYPE_FLOAT else None


def _map_key(key: object) -> str:
    return str(key).lower() if isinstance(key, bool) else str(key)


def _unchanged(value: Any) -> object:
    return value


def _wrapped(value: Any) -> object:
    return value.value


def _duration(value: Any) -> str:
    """Return seconds, as Protobuf's JSON has them: 1.5s."""
    total = value.seconds * 1_000_000_000 + value.nanos
    seconds, nanos = divmod(abs(total), 1_000_000_000)
    fraction = f".{nanos:09d}".rstrip("0").rstrip(".")
    return f"{'-' if total < 0 else ''}{seconds}{fraction}s"


def _struct(value: Any) -> dict[str, object]:
    return {key: _struct_value(value.fields[key]) for key in value.fields}


def _struct_list(value: Any) -> list[object]:
    return [_struct_value(item) for item in value.values]


def _struct_value(value: Any) -> object:
    match value.WhichOneof("kind"):
        case "number_value":
            number = value.number_value
            return int(number) if number.is_integer() and abs(number) < 2**53 else number
        case "struct_value":
            return _struct(value.struct_value)
        case "list_value":
            return _struct_list(value.list_value)
        case "string_value" | "bool_value" as kind:
            return getattr(value, kind)
        case _:
            return None


_WELL_KNOWN: Final[dict[str, Convert]] = {
    "google.protobuf.Timestamp": timestamp_moment,
    "google.protobuf.Duration": _duration,
    "google.protobuf.Struct": _struct,
    "google.protobuf.ListValue": _struct_list,
    "google.protobuf.Value": _struct_value,
    "google.protobuf.FieldMask": lambda value: ",".join(value.paths),
    "google.protobuf.FloatValue": lambda value: shortest(value.value),
    **{
        f"google.protobuf.{kind}Value": _wrapped
        for kind in ("Double", "Int64", "UInt64", "Int32", "UInt32", "Bool", "String", "Bytes")
    },
}
