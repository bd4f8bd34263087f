"""Avro: what fastavro reads is read safely, and our own report without fastavro."""

import io
import json
import subprocess
import sys
import uuid
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from fastavro import parse_schema, schemaless_reader, schemaless_writer

from pipeline.core.report import SHORT_BYTES, Entry, Report, apply_limits
from pipeline.errors import DecodeError
from pipeline.formats.avro import AvroSchema
from pipeline.formats.reports import read_avro_report, write_avro_report

OWN = (Path(__file__).parents[3] / "topics" / "report.avsc").read_text()
T0 = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
DECIMAL = {"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2}
LINKED = {"type": "record", "name": "Link", "fields": [{"name": "next", "type": ["null", "Link"]}]}


def written(schema, value):
    stream = io.BytesIO()
    schemaless_writer(stream, parse_schema(schema), value)
    return stream.getvalue()


def number(value):
    return written("long", value)


def read(schema, data):
    return AvroSchema(json.dumps(schema)).read(data)


def record(**fields):
    return {"type": "record", "name": "R", "fields": [{"name": name, "type": kind} for name, kind in fields.items()]}


def test_record_is_a_dict_of_python_values():
    moment = {"type": "long", "logicalType": "timestamp-millis"}
    schema = record(
        text="string",
        maybe=["null", "long"],
        at=moment,
        day={"type": "int", "logicalType": "date"},
        price={"type": "bytes", "logicalType": "decimal", "precision": 6, "scale": 2},
        cost={"type": "fixed", "name": "C", "size": 4, "logicalType": "decimal", "precision": 6, "scale": 1},
        id={"type": "string", "logicalType": "uuid"},
        kind={"type": "enum", "name": "K", "symbols": ["A", "B"]},
        tags={"type": "map", "values": "double"},
    )
    value = {
        "text": "t", "maybe": None, "at": T0.replace(microsecond=678000), "day": date(2026, 1, 2),
        "price": Decimal("12.50"), "cost": Decimal("-0.1"), "id": uuid.UUID(int=7), "kind": "B", "tags": {"a": 0.5},
    }  # fmt: skip
    assert read(schema, written(schema, value)) == value


def test_single_precision_number_has_no_more_digits_than_it_needs():
    schema = record(a="float", b=["null", "float"], c={"type": "array", "items": {"type": "float"}})
    value = {"a": 21.7, "b": 0.1, "c": [3.4028235e38, float("inf"), 1.0]}
    assert read(schema, written(schema, value)) == value


def test_schema_may_refer_to_others():
    inner = {"type": "record", "name": "x.Inner", "fields": [{"name": "n", "type": "int"}]}
    outer = AvroSchema(json.dumps(record(inner="x.Inner")), [json.dumps(inner)])
    assert outer.read(number(4)) == {"inner": {"n": 4}}


@pytest.mark.parametrize(
    "text", ["", "nonsense", '{"type": "recor"}', '{"type": "record"}', '"x.Unknown"', "[" * 5000, "7"]
)
def test_what_is_no_schema_is_refused_with_a_reason(text):
    with pytest.raises(DecodeError, match="not an Avro schema"):
        AvroSchema(text)


HOSTILE = {
    "a text of 4 EiB": ("string", number(1 << 62) + b"x"),
    "a text of negative length": ("string", number(-5) + b"x"),
    "bytes of 1 TB": ("bytes", number(10**12)),
    "a number of a million bytes": ("long", b"\xff" * 1_000_000),
    "no such branch": (["null", "string"], number(9)),
    "no such symbol": ({"type": "enum", "name": "e", "symbols": ["a"]}, number(-9)),
    "a time after 9999": ({"type": "long", "logicalType": "timestamp-micros"}, number(1 << 62)),
    "not UTF-8": ("string", b"\x02\xff"),
    "an array of 10^18 items": ({"type": "array", "items": "string"}, number(10**18)),
    "a decimal of 2,000 bytes": (DECIMAL, number(2000) + b"\x7f" * 2000),
    "a decimal of 2,000 bytes in a union": (["null", DECIMAL], number(1) + number(2000) + b"\x7f" * 2000),
    "a decimal of 2,000 fixed bytes": ({**DECIMAL, "type": "fixed", "name": "F", "size": 2000}, b"\x7f" * 2000),
    "nothing": ("long", b""),
    "a byte too many": ("long", b"\x02\x02"),
}  # fmt: skip


@pytest.mark.parametrize(("schema", "data"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_are_refused_with_a_reason(schema, data):
    with pytest.raises(DecodeError, match="not what its Avro schema describes"):
        read(schema, data)


UNSAFE = {
    "itself": LINKED,
    "itself, in an array": {**LINKED, "fields": [{"name": "all", "type": {"type": "array", "items": "Link"}}]},
    "items without bytes": {"type": "array", "items": "null"},
    "empty records": {"type": "array", "items": {"type": "record", "name": "E", "fields": []}},
    "42 values for a byte": {"type": "array", "items": record(a="int", **{f"n{n}": "null" for n in range(40)})},
    "fixed of no bytes": {"type": "array", "items": {"type": "fixed", "name": "F", "size": 0}},
}


@pytest.mark.parametrize("schema", UNSAFE.values(), ids=UNSAFE)
def test_schema_by_which_few_bytes_stand_for_any_number_of_values_is_refused(schema):
    with pytest.raises(DecodeError, match="can't be read safely"):
        AvroSchema(json.dumps(schema))


def test_schema_that_doubles_40_times_is_refused_at_once():
    schema = {"type": "record", "name": "R0", "fields": []}
    for depth in range(1, 41):
        fields = [{"name": "a", "type": schema}, {"name": "b", "type": f"R{depth - 1}"}]
        schema = {"type": "record", "name": f"R{depth}", "fields": fields}
    with pytest.raises(DecodeError, match="can't be read safely"):
        AvroSchema(json.dumps(schema))


def test_fastavro_still_ends_the_process_on_deep_nesting():
    # Why recursive schemas are refused: when this fails, they need not be any more.
    program = f"""
import io, fastavro
schema = fastavro.parse_schema({LINKED!r})
fastavro.schemaless_reader(io.BytesIO(b"\\2" * 1_000_000 + b"\\0"), schema, None)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert ended.returncode < 0


REPORTS = [
    Report("host-17", [], None),
    Report(str(uuid.UUID(int=1)), [Entry("cpu", "12%"), Entry("disk", "", "timed out", T0)], T0),
    Report("ü" * 255, [Entry("k" * 64, "v" * 63), Entry("k" * 63, "v" * 64), Entry("\u20ac" * 100, "x" * 9000)], T0),
    Report("a", [Entry(f"k{n}", str(n)) for n in range(200)], datetime(1, 1, 1, tzinfo=UTC)),
    Report("a", [Entry("k", "v", "e" * 100)], datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)),
]


@pytest.mark.parametrize("report", REPORTS)
def test_report_is_read_as_it_was_written(report):
    assert read_avro_report(write_avro_report(report)) == report


@pytest.mark.parametrize("report", REPORTS[:-2])
def test_report_is_written_as_fastavro_writes_it(report):
    entries = [{name: getattr(entry, name) for name in Entry.__struct_fields__} for entry in report.entries]
    value = {"agent_id": report.agent_id, "collected_at": report.collected_at, "entries": entries}
    data = written(json.loads(OWN), value)
    assert write_avro_report(report) == data
    assert schemaless_reader(io.BytesIO(data), parse_schema(json.loads(OWN)), None) == value


def test_report_in_blocks_that_say_their_sizes_is_read():
    # As Java's BlockingBinaryEncoder writes arrays: a negative count, the size of the block, the items.
    entries = b"".join(written("string", text) for text in ("k", "v", "")) + b"\0"
    data = written("string", "a") + b"\0" + number(-1) + number(len(entries)) + entries + number(1) + entries + b"\0"
    assert read_avro_report(data) == Report("a", [Entry("k", "v"), Entry("k", "v")])


def test_nul_in_a_report_becomes_a_replacement_character():
    report = Report("a", [Entry("k\0", "v\0", "e\0")])
    assert read_avro_report(write_avro_report(report)) == Report("a", [Entry("k\ufffd", "v\ufffd", "e\ufffd")])


@pytest.mark.parametrize(
    "report", [Report("a", [Entry("k", "\0" * 1000)]), Report("a", [Entry("\0", "v", "\0" * 1000)])]
)
def test_nul_in_a_short_report_is_limited_as_anywhere(report):
    payload = write_avro_report(report)
    assert len(payload) <= SHORT_BYTES  # nothing checks it after the reader
    read = read_avro_report(payload)
    apply_limits(report)
    assert read == report
    assert "of 3000 bytes exceeded 2048 bytes" in read.entries[0].error


def test_every_truncation_of_a_report_is_refused():
    for report in REPORTS[1:4]:
        data = write_avro_report(report)
        for end in range(len(data)):
            with pytest.raises(DecodeError):
                read_avro_report(data[:end])
        with pytest.raises(DecodeError):
            read_avro_report(data + b"\0")


@pytest.mark.parametrize(
    "data",
    [
        b"\2a\4",
        b"\2a\0" + number(10**18),
        b"\2a\0" + number(-(10**18)),
        b"\xff" * 30,
        b"\1",
        b"\2a\2" + number(1 << 62),
    ],
)
def test_hostile_report_is_refused(data):
    with pytest.raises(DecodeError):
        read_avro_report(data)


def test_schema_is_our_own_whatever_its_names_and_comments():
    schema = json.loads(OWN)
    schema["name"], schema["namespace"], schema["doc"] = "Sample", "com.example", "ours"
    schema["fields"][0]["type"] = {"type": "string", "avro.java.string": "String"}
    assert AvroSchema(json.dumps(schema)).is_report


def test_schema_with_another_field_or_type_is_not_our_own():
    more, other = json.loads(OWN), json.loads(OWN)
    more["fields"].append({"name": "site", "type": "string"})
    other["fields"][0]["type"] = "long"
    assert not AvroSchema(json.dumps(more)).is_report
    assert not AvroSchema(json.dumps(other)).is_report
