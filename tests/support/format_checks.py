"""What the readers of other formats are fed, and what must hold, as strategies.py has it for our own JSON."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fastavro import parse_schema, schemaless_writer
from hypothesis import strategies as st

from pipeline.core.report import Entry, Report
from pipeline.errors import DecodeError
from pipeline.formats.avro import AvroSchema
from pipeline.formats.framing import VALUE_SCHEMA_ID_HEADER, read_message_indexes, split_frame
from pipeline.formats.protobuf import ProtobufSchema
from pipeline.formats.reports import read_avro_report, write_avro_report, write_protobuf_report
from pipeline.formats.schemas import read_json

TOPICS = Path(__file__).parents[2] / "topics"
_MOMENT = {"type": "long", "logicalType": "timestamp-micros"}
# Every type, so that damage reaches every reader.
FOREIGN_AVRO = {
    "type": "record",
    "name": "Foreign",
    "fields": [
        {"name": "id", "type": {"type": "string", "logicalType": "uuid"}},
        {"name": "at", "type": ["null", _MOMENT, {"type": "int", "logicalType": "date"}]},
        {"name": "time", "type": {"type": "long", "logicalType": "time-micros"}},
        {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 8, "scale": 2}},
        {"name": "kind", "type": {"type": "enum", "name": "Kind", "symbols": ["A", "B"]}},
        {"name": "hash", "type": {"type": "fixed", "name": "Hash", "size": 4}},
        {"name": "tags", "type": {"type": "map", "values": ["null", "float", "boolean"]}},
        {"name": "list", "type": {"type": "array", "items": ["double", "string", "bytes"]}},
    ],
}
FOREIGN_PROTO = """
syntax = "proto3";
import "google/protobuf/struct.proto";
import "google/protobuf/duration.proto";
message Foreign {
  enum Kind { A = 0; B = 1; }
  message Inner { Foreign foreign = 1; }
  map<string, float> numbers = 1;
  google.protobuf.Struct any = 2;
  google.protobuf.Duration took = 3;
  repeated Kind kinds = 4;
  oneof choice { Inner inner = 5; bytes raw = 6; }
  repeated string texts = 7;
}
"""
_MOMENTS = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31), timezones=st.just(UTC))
_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)
_ENTRIES = st.builds(Entry, _TEXT, _TEXT, _TEXT, st.none() | _MOMENTS)
REPORTS = st.builds(Report, _TEXT, st.lists(_ENTRIES, max_size=5), st.none() | _MOMENTS)


class Target(NamedTuple):
    """What is read, by what: `check` raises nothing but DecodeError, or an AssertionError for what must hold."""

    good: st.SearchStrategy[bytes]
    check: Callable[[bytes], object]


@cache
def _avro() -> AvroSchema:
    return AvroSchema(json.dumps(FOREIGN_AVRO))


@cache
def _protobuf(text: str) -> ProtobufSchema:
    return ProtobufSchema(text)


def own_protobuf() -> ProtobufSchema:
    return _protobuf((TOPICS / "report.proto").read_text())


def _foreign_avro() -> bytes:
    value = {
        "id": "00112233-4455-6677-8899-aabbccddeeff", "at": 5, "time": 7, "price": b"\x01\x02", "kind": "B",
        "hash": b"hash", "tags": {"a": None, "b": 1.5, "c": True}, "list": [1.5, "x", b"\1"],
    }  # fmt: skip
    stream = io.BytesIO()
    bare = json.loads(json.dumps(FOREIGN_AVRO).replace('"logicalType"', '"was"'))
    schemaless_writer(stream, parse_schema(bare), value)
    return stream.getvalue()


def storable(report: Report) -> Report:
    """Return a report as its readers return it: without NUL."""
    entries = [
        Entry(*(text.replace("\0", "\ufffd") for text in (entry.key, entry.value, entry.error)), entry.collected_at)
        for entry in report.entries
    ]
    return Report(report.agent_id, entries, report.collected_at)


def _check_avro_report(raw: bytes) -> None:
    report = read_avro_report(raw)
    assert read_avro_report(write_avro_report(report)) == report


def _check_protobuf_report(raw: bytes) -> None:
    report = own_protobuf().read_report(b"\0" + raw)
    assert own_protobuf().read_report(b"\0" + write_protobuf_report(report)) == report


def _check_framing(raw: bytes) -> None:
    with contextlib.suppress(DecodeError):
        read_message_indexes(raw)
    with contextlib.suppress(DecodeError):
        split_frame(raw)
    split_frame(b"", [(VALUE_SCHEMA_ID_HEADER, raw)])


def _check_protobuf(raw: bytes) -> None:
    _protobuf(FOREIGN_PROTO).read(raw)


_FOREIGN_MESSAGE = (
    b"\0\x0a\x08\x0a\x01a\x15\x00\x00\x80?\x12\x0b\x0a\x09\x0a\x01k\x12\x04\x1a\x02vv"
    b"\x1a\x02\x08\x05\x22\x02\x01\x07*\x04\x0a\x02:\x00:\x01t"
)
TARGETS = {
    "avro reports": Target(REPORTS.map(write_avro_report), _check_avro_report),
    "avro": Target(st.builds(_foreign_avro), lambda raw: _avro().read(raw)),
    "protobuf reports": Target(REPORTS.map(write_protobuf_report), _check_protobuf_report),
    "protobuf": Target(st.just(_FOREIGN_MESSAGE), _check_protobuf),
    "json": Target(st.builds(lambda text: json.dumps({"a": [text, 1.5]}).encode(), _TEXT), read_json),
    "framing": Target(st.just(b"\0\0\0\0\7\4\2\2rest"), _check_framing),
}


@st.composite
def damaged(draw: Any, good: st.SearchStrategy[bytes]) -> bytes:
    """Something good with some bytes changed, removed or inserted, or cut off."""
    raw = bytearray(draw(good))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(raw[: draw(st.integers(0, len(raw)))] if draw(st.booleans()) else raw)


def outcome(check: Callable[[bytes], object], raw: bytes) -> str:
    """Run a check: "decoded" or "refused"."""
    try:
        check(raw)
    except DecodeError:
        return "refused"
    return "decoded"
