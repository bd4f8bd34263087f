"""What the decoder makes of records of each format, framed or not, and which of them it reads the fast way."""

import json
import struct
import uuid
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import pytest
from faust.types import TP
from prometheus_client import CollectorRegistry

from pipeline.core.decoding import SchemaNeeded, fold_loading
from pipeline.core.record import KafkaRecord
from pipeline.core.report import PARSE_ERRORS, Entry, Report, agent_uuid, encode_report
from pipeline.core.tumbling import TumblingWindows
from pipeline.core.window import OpenWindow
from pipeline.data_files import data_dir
from pipeline.errors import DecodeError
from pipeline.formats.decoder import EventsDecoder
from pipeline.formats.mapping import CompiledMapping, MappingConfig
from pipeline.formats.registry import RegisteredSchema, UnknownSchema
from pipeline.formats.reports import write_avro_report
from pipeline.formats.schemas import Schemas
from pipeline.monitoring.metrics import WorkerMetrics
from pipeline.testing import ManualClock
from pipeline.worker.partition import SourcePartition

AGENT = str(uuid.UUID(int=1))
T0 = datetime(2024, 1, 1, tzinfo=UTC)
T0_MS = 1_704_067_200_000
REPORT = Report(AGENT, [Entry("cpu", "12%"), Entry("disk", "", "timed out")], T0)
ROWS = {(AGENT, "cpu"): ("12%", ""), (AGENT, "disk"): ("", "timed out")}
JSON, AVRO, OTHER_AVRO, UNKNOWN, PROTOBUF = 1, 2, 3, 4, 5
OTHER_SCHEMA = {
    "type": "record",
    "name": "Telemetry",
    "fields": [{"name": "agent_id", "type": "string"}, {"name": "entries", "type": {"type": "array", "items": {
        "type": "record", "name": "Item", "fields": [
            {"name": "key", "type": "string"}, {"name": "value", "type": ["null", "double", "string"]}]}}}],
}  # fmt: skip

PROTO = """
syntax = "proto3";
message Other { string name = 1; }
message Mine { string agent_id = 1; message Item { string key = 1; string value = 2; } repeated Item entries = 2; }
"""


class Registry:
    """Holds four schemas; `asked` are the ids that it was asked for."""

    def __init__(self):
        self.asked = []

    def fetch(self, schema_id):
        self.asked.append(schema_id)
        texts = {
            JSON: ("JSON", "{}"),
            AVRO: ("AVRO", (data_dir("topics") / "report.avsc").read_text(encoding="utf-8")),
            OTHER_AVRO: ("AVRO", json.dumps(OTHER_SCHEMA)),
            PROTOBUF: ("PROTOBUF", PROTO),
        }
        if schema_id not in texts:
            raise UnknownSchema(f"no schema {schema_id}")
        return RegisteredSchema(*texts[schema_id], {})


@pytest.fixture
def registry():
    return Registry()


@pytest.fixture
def decoder(registry):
    return EventsDecoder(Schemas(registry), None)


def mapped(registry=None, **config):
    return EventsDecoder(Schemas(registry) if registry else None, CompiledMapping(MappingConfig(**config)))


def framed(schema_id, payload):
    return struct.pack(">bI", 0, schema_id) + payload


def record(value, offset=0, headers=()):
    return KafkaRecord(offset, T0_MS, None, value, headers)


def fold(decoder, *records):
    """Fold records one after the other; return (rows, reasons of the rejected)."""
    window = OpenWindow(0.0, capacity=10**6, max_clock_skew=timedelta(60), decoder=decoder)
    assert fold_loading(window, decoder, records) == len(records)
    closed = window.close("scheduled", 1.0)
    rows = {(row.agent_id, row.key): (row.value, row.error) for row in closed.rows}
    return rows, [rejected.reason for rejected in closed.rejected]


def is_fast(decoder, value):
    try:
        decoder.parse(value)
    except (*PARSE_ERRORS, KeyError, DecodeError):
        return False
    return True


@pytest.mark.parametrize(
    ("schema_id", "payload"), [(JSON, encode_report(REPORT)), (AVRO, write_avro_report(REPORT))], ids=["json", "avro"]
)
def test_framed_report_is_read_by_its_schema_and_the_next_one_the_fast_way(decoder, registry, schema_id, payload):
    value = framed(schema_id, payload)
    assert fold(decoder, record(value), record(value, 1), record(value, 2)) == (ROWS, [])
    assert is_fast(decoder, value)
    assert registry.asked == [schema_id]


def test_schema_id_in_a_header_counts_and_leaves_the_value_as_it_is(decoder):
    header = ("__value_schema_id", struct.pack(">bI", 0, AVRO))
    assert fold(decoder, record(write_avro_report(REPORT), headers=[header])) == (ROWS, [])


def test_topic_may_hold_own_json_and_framed_records_of_several_schemas(decoder):
    json_framed = framed(JSON, encode_report(Report(AGENT, [Entry("b", "2")])))
    avro_framed = framed(AVRO, write_avro_report(Report("host-17", [Entry("c", "3")])))
    values = [encode_report(Report(AGENT, [Entry("a", "1")])), json_framed, avro_framed, encode_report(REPORT)]
    rows, reasons = fold(decoder, *(record(value, offset) for offset, value in enumerate(values)))
    named = {(agent_uuid("host-17"), "c"): ("3", "")}
    assert rows == {(AGENT, "a"): ("1", ""), (AGENT, "b"): ("2", ""), **named, **ROWS}
    assert reasons == []
    assert is_fast(decoder, json_framed)
    assert is_fast(decoder, avro_framed)


def test_report_in_a_schema_of_somebody_else_has_its_values_as_text(decoder):
    # agent_id "a", one block of one entry: key "k", branch 1 (a double).
    payload = b"\x02a" + b"\x02" + b"\x02k" + b"\x02" + struct.pack("<d", 21.5) + b"\0"
    assert fold(decoder, record(framed(OTHER_AVRO, payload))) == ({(agent_uuid("a"), "k"): ("21.5", "")}, [])


def test_numbers_in_framed_json_are_text_and_read_the_fast_way_after_the_first(decoder):
    value = framed(JSON, b'{"agent_id":"%s","entries":[{"key":"n","value":1.5}]}' % AGENT.encode())
    assert fold(decoder, record(value), record(value, 1)) == ({(AGENT, "n"): ("1.5", "")}, [])
    assert is_fast(decoder, value)


def test_value_over_the_limit_is_cut_whatever_the_format(decoder):
    long = Report(AGENT, [Entry("k", "x" * 3000), Entry("n", "a\0b")], T0)
    expected = {(AGENT, "k"): ("x" * 2048, "value of 3000 bytes exceeded 2048 bytes"), (AGENT, "n"): ("a\ufffdb", "")}
    for schema_id, payload in ((JSON, encode_report(long)), (AVRO, write_avro_report(long))):
        value = framed(schema_id, payload)
        assert fold(decoder, record(value), record(value, 1)) == (expected, [])


def test_record_of_an_unknown_schema_is_refused_and_costs_itself_alone(decoder, registry):
    good = framed(AVRO, write_avro_report(REPORT))
    bad = framed(UNKNOWN, b"x")
    rows, reasons = fold(decoder, record(good), record(bad, 1), record(bad, 2), record(good, 3))
    assert (rows, len(reasons), registry.asked) == (ROWS, 2, [AVRO, UNKNOWN])
    assert all("no schema 4" in reason for reason in reasons)


@pytest.mark.parametrize("value", [b"\0", b"\0\0\0", framed(AVRO, b""), framed(AVRO, b"\xff" * 9), framed(JSON, b"{")])
def test_framed_record_that_cant_be_read_is_refused_with_a_reason(decoder, value):
    rows, reasons = fold(decoder, record(value), record(framed(AVRO, write_avro_report(REPORT)), 1))
    assert (rows, len(reasons)) == (ROWS, 1)
    assert reasons[0]


def test_schema_is_asked_for_before_anything_behind_it_is_folded(decoder):
    window = OpenWindow(0.0, capacity=10**6, max_clock_skew=timedelta(60), decoder=decoder)
    records = [record(encode_report(REPORT)), record(framed(AVRO, write_avro_report(REPORT)), 1)]
    assert (window.fold(records), window.schema_needed) == (1, AVRO)
    with pytest.raises(SchemaNeeded):
        decoder.decode(records[1])


def test_framed_json_needs_no_registry_and_all_else_says_which_setting_it_needs():
    decoder = EventsDecoder(None, None)
    records = [record(framed(JSON, encode_report(REPORT))), record(framed(AVRO, write_avro_report(REPORT)), 1)]
    rows, (reason,) = fold(decoder, *records)
    assert rows == ROWS
    assert reason == ("written in schema 2 of a schema registry: set AGENT_METADATA_SCHEMA_REGISTRY_URL to read it")


def test_mapping_reads_json_framed_or_not_and_avro(registry):
    decoder = mapped(registry, id="agent_id", entries="entries", key="key", value="value")
    value = b'{"agent_id":"host-1","entries":[{"key":"k","value":"v"}]}'
    rows = {(agent_uuid("host-1"), "k"): ("v", "")}
    assert fold(decoder, record(value), record(value, 1)) == (rows, [])
    assert is_fast(decoder, value)
    assert fold(decoder, record(framed(JSON, value)), record(framed(JSON, value), 1)) == (rows, [])
    assert is_fast(decoder, framed(JSON, value))
    payload = b"\x0chost-1" + b"\x02" + b"\x02k" + b"\x04" + b"\x02v" + b"\0"
    assert fold(decoder, record(framed(OTHER_AVRO, payload))) == (rows, [])


def test_mapping_that_needs_headers_reads_each_record_with_care():
    decoder = mapped(id="header:ce_source", entries=".")
    some = record(b'{"temperature":21.5}', headers=[("ce_source", b"sensor-1")])
    assert fold(decoder, some) == ({(agent_uuid("sensor-1"), "temperature"): ("21.5", "")}, [])


def test_tombstone_of_a_mapped_topic_is_nothing_and_of_our_own_a_dead_letter():
    assert fold(mapped(id="id", entries="data"), record(None)) == ({}, [])
    rows, (reason,) = fold(EventsDecoder(None, None), record(None))
    assert (rows, "tombstone" in reason) == ({}, True)


def test_record_that_the_mapping_does_not_fit_says_where():
    rows, (reason,) = fold(mapped(id="device.id", entries="data"), record(b'{"device":{},"data":{}}'))
    assert rows == {}
    assert "device.id" in reason


@pytest.mark.parametrize("is_known", [False, True])
@pytest.mark.parametrize("schema_id", [AVRO, UNKNOWN])
def test_plain_report_is_one_whatever_its_header_says(decoder, is_known, schema_id):
    if is_known:
        decoder.agent_ids.learn(AGENT)
    header = ("__value_schema_id", struct.pack(">bI", 0, schema_id))
    assert fold(decoder, record(encode_report(REPORT), headers=[header])) == (ROWS, [])
    assert fold(decoder, record(encode_report(REPORT), headers=[("__value_schema_id", b"x")])) == (ROWS, [])


@pytest.mark.parametrize("last", [b"", b"xx", None, encode_report(REPORT), framed(UNKNOWN, b"x")])
async def test_worker_takes_a_chunk_of_framed_records_whatever_ends_it(decoder, last):
    """The time of a chunk's last record is sampled by the fast way, which may not be made for that record."""
    delivered = []

    async def deliver(_number, closed):
        delivered.append(closed)

    partition = SourcePartition(
        TP("events", 0),
        consumer=Consumer(),
        backlog_end=0,
        decoder=decoder,
        windows=TumblingWindows(5.0, 1, 1000, timedelta(60)),
        clock=ManualClock(),
        metrics=WorkerMetrics(CollectorRegistry()),
        deliver=deliver,
        on_failure=pytest.fail,
    )
    records = [record(framed(AVRO, write_avro_report(REPORT))), record(last, 1)]
    await partition.take(Chunk(records))
    await partition.finish("shutdown")
    assert [(closed.first, closed.last) for closed in delivered] == [(0, 1)]
    await partition.abandon()


class Consumer:
    """A partition without a commit."""

    def committed_offset(self, _tp):
        return None


class Chunk(NamedTuple):
    records: list
    start: int = 0
    next_offset: int = 2

    def slices(self, _refuse):
        return [self.records]


def test_other_message_of_a_protobuf_schema_is_read_by_its_fields(registry):
    schemas = Schemas(registry)
    decoder = EventsDecoder(schemas, None)
    other = b"\x02\x02" + b"\x0a\x01a" + b"\x12\x06" + b"\x0a\x01k\x12\x01v"  # index 1; agent_id "a"; an entry
    assert fold(decoder, record(framed(PROTOBUF, other))) == ({(agent_uuid("a"), "k"): ("v", "")}, [])
