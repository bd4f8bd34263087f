"""Avro: records in any schema, by fastavro, kept from what hostile bytes could make it do."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from fastavro import parse_schema, schemaless_reader
from fastavro.read import LOGICAL_READERS

from pipeline.data_files import data_dir
from pipeline.errors import DecodeError
from pipeline.formats.floats import shortest

# The fewest bytes of each primitive type.
_PRIMITIVES: Final = {
    "null": 0, "boolean": 1, "int": 1, "long": 1, "float": 4, "double": 8, "bytes": 1, "string": 1,
}  # fmt: skip
# What determines the bytes; the rest of a schema is comment.
_MEANINGFUL: Final = frozenset(
    {"type", "fields", "items", "values", "symbols", "size", "logicalType", "precision", "scale"}
)
# Values that a byte of an array may stand for, and those that any record may have without bytes for each.
_MOST_PER_BYTE: Final = 10
_MOST_VALUES: Final = 10_000
# Bytes of a decimal: 2,400 digits, which no value has room for. fastavro's time grows with their square.
_MOST_DECIMAL_BYTES: Final = 1_000
# fastavro's way to let a program convert what it has read: logical types, which floats and decimals are given below.
_SHORTEST: Final = "agent-metadata-shortest"
_DECIMAL: Final = "agent-metadata-decimal"


class AvroSchema:
    """A schema as a registry holds it, ready to read records that were written in it.

    Guarantee: no bytes can fill the memory, or go on for ever, or end the process; fastavro promises none of these.
    """

    def __init__(self, text: str, references: Sequence[str] = ()) -> None:
        """Parse a schema; `references` are those that it refers to, each after what it refers to itself.

        Raises:
            DecodeError: it is no Avro schema, or none that can be read safely.
        """
        named: dict[str, Any] = {}
        try:
            for reference in references:
                parse_schema(_with_own_types(json.loads(reference)), named)
            raw = json.loads(text)
            self._schema = parse_schema(_with_own_types(raw), named)
            _Safety(named).check(self._schema)
            self.is_report = not references and _shape(raw) == _report_shape()
            """Whether its records are written just as those of topics/report.avsc."""
        except DecodeError:
            raise
        except Exception as error:  # whatever fastavro meets: KeyError, TypeError, RecursionError, its own
            raise DecodeError(f"not an Avro schema: {_in_words(error)}") from error

    def read(self, data: bytes) -> object:
        """Read one record: a record is a dict, an enum its symbol, and logical types are Python's own.

        Raises:
            DecodeError: these bytes are not what the schema describes, or more than that.
        """
        stream = io.BytesIO(data)
        try:
            value: object = schemaless_reader(stream, self._schema, None)
        except MemoryError:
            raise
        except Exception as error:  # EOFError, IndexError, OverflowError, ValueError: fastavro checks little itself
            raise DecodeError(f"not what its Avro schema describes: {_in_words(error)}") from error
        if stream.tell() != len(data):
            raise DecodeError(f"not what its Avro schema describes: {len(data) - stream.tell()} bytes are left over")
        return value


class _Size(NamedTuple):
    """The fewest bytes of a value, and how many values (its own, and those in it) these may stand for."""

    least: int
    values: int


class _Safety:
    """Refuses schemas in which a few bytes may stand for any number of values.

    fastavro reads a recursive schema by recursion in C, so that 10,000 nested values, a byte each, end the process; and
    of items without bytes an array may claim any number.
    """

    def __init__(self, named: dict[str, Any]) -> None:
        self._named = named
        self._known: dict[str, _Size] = {}
        self._within: set[str] = set()

    def check(self, schema: Any) -> _Size:
        """Return the size of the smallest values.

        Raises:
            DecodeError: this is such a schema.
        """
        if isinstance(schema, list):
            branches = [self.check(branch) for branch in schema]
            worst = max(branches, key=lambda size: size.values / (1 + size.least), default=_Size(0, 0))
            return _Size(1 + worst.least, 1 + worst.values)
        if isinstance(schema, str):
            least = _PRIMITIVES.get(schema)
            return self.check(self._named[schema]) if least is None else _Size(least, 1)
        kind = schema["type"]
        if kind in ("record", "error"):
            return self._check_record(schema)
        if kind in ("array", "map"):
            item = self.check(schema["items" if kind == "array" else "values"])
            if item.values > _MOST_PER_BYTE * (item.least + (kind == "map")):
                raise DecodeError(f"an Avro schema whose {kind} has items that take no bytes can't be read safely")
            return _Size(1, 1)
        if kind == "fixed":
            return _Size(schema["size"], 1)
        return _Size(_PRIMITIVES.get(kind, 1), 1)

    def _check_record(self, schema: dict[str, Any]) -> _Size:
        name = schema["name"]
        if name in self._within:
            raise DecodeError(f"an Avro schema that contains itself ({name}) can't be read safely")
        if name not in self._known:
            self._within.add(name)
            fields = [self.check(field["type"]) for field in schema["fields"]]
            self._within.remove(name)
            size = _Size(sum(field.least for field in fields), 1 + sum(field.values for field in fields))
            if size.values > _MOST_VALUES:
                raise DecodeError(f"an Avro schema whose record {name} has {size.values} values can't be read safely")
            self._known[name] = size
        return self._known[name]


def _with_own_types(schema: Any) -> Any:
    """Return a schema whose floats are read with as few digits as they need, and whose decimals with bounded effort."""
    if schema == "float":
        return {"type": "float", "logicalType": _SHORTEST}
    if isinstance(schema, list):
        return [_with_own_types(branch) for branch in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {name: _with_own_types(schema[name]) for name in {"type", "items", "values"} & set(schema)}
    if schema.get("type") == "float":
        changed = {"type": "float", "logicalType": _SHORTEST}
    elif schema.get("type") in ("bytes", "fixed") and schema.get("logicalType") == "decimal":
        changed["logicalType"] = _DECIMAL
    if isinstance(schema.get("fields"), list):
        changed["fields"] = [{**field, "type": _with_own_types(field["type"])} for field in schema["fields"]]
    return {**schema, **changed}


def _read_decimal(data: bytes, writer_schema: Any, _reader_schema: Any) -> object:
    if len(data) > _MOST_DECIMAL_BYTES:
        raise ValueError(f"a decimal of {len(data)} bytes exceeds {_MOST_DECIMAL_BYTES}")
    return _read_short_decimal(data, writer_schema, None)


_read_short_decimal: Final = LOGICAL_READERS["bytes-decimal"]
LOGICAL_READERS[f"float-{_SHORTEST}"] = lambda number, *_: shortest(number)
LOGICAL_READERS[f"bytes-{_DECIMAL}"] = LOGICAL_READERS[f"fixed-{_DECIMAL}"] = _read_decimal


def _report_shape() -> object:
    return _shape(json.loads((data_dir("topics") / "report.avsc").read_text(encoding="utf-8")))


def _shape(schema: Any) -> object:
    """Return what determines the bytes of a schema's records, and the names of their fields."""
    if isinstance(schema, list):
        return [_shape(branch) for branch in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {name: schema[name] for name in _MEANINGFUL & set(schema)}
    for name in {"type", "items", "values"} & set(kept):
        kept[name] = _shape(kept[name])
    if "fields" in kept:
        kept["fields"] = [(field["name"], _shape(field["type"])) for field in kept["fields"]]
    return kept["type"] if set(kept) == {"type"} else kept


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__} {error}".strip()[:200]
