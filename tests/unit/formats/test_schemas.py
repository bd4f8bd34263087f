"""Schemas are asked for once, and whatever ids records carry, memory and requests stay bounded."""

import json
import tempfile
from pathlib import Path

import pytest

from pipeline.core.decoding import SchemaNeeded
from pipeline.core.report import Entry, Report, convert_report
from pipeline.errors import DecodeError, ServiceUnavailable
from pipeline.formats import schemas as schemas_module
from pipeline.formats.registry import SchemaRegistry
from pipeline.formats.reports import write_avro_report, write_protobuf_report
from pipeline.formats.schemas import UNKNOWN_AT_ONCE, UNKNOWN_SECONDS, Schemas, read_json
from tests.support.stub_registry import StubRegistry

TOPICS = Path(__file__).parents[3] / "topics"
REPORT = Report("a", [Entry("k", "v")])


class Loaded:
    """Schemas over a stub registry, at a time that the test sets."""

    def __init__(self, stub):
        self.stub, self.time = stub, 0.0
        self.schemas = Schemas(SchemaRegistry({"url": stub.url}), now=lambda: self.time)

    def answer(self, schema_id, text, kind="AVRO"):
        self.stub.answers[f"/schemas/ids/{schema_id}"] = (200, {"schema": text, "schemaType": kind})

    def asked(self, schema_id):
        return self.stub.requests[f"/schemas/ids/{schema_id}"]


@pytest.fixture
def loaded():
    with StubRegistry() as stub:
        yield Loaded(stub)


def test_schema_is_needed_until_it_is_loaded_and_asked_for_once(loaded):
    loaded.answer(1, '"string"')
    with pytest.raises(SchemaNeeded) as needed:
        loaded.schemas.reader(1)
    assert needed.value.schema_id == 1
    for _ in range(3):
        loaded.schemas.load(1)
        assert loaded.schemas.reader(1)(b"\x02a") == "a"
    assert loaded.asked(1) == 1


def test_unknown_id_is_refused_and_asked_for_again_after_a_minute(loaded):
    for _ in range(3):
        loaded.schemas.load(7)
        with pytest.raises(DecodeError, match="no schema 7"):
            loaded.schemas.reader(7)
    assert loaded.asked(7) == 1
    loaded.time += UNKNOWN_SECONDS
    loaded.answer(7, '"string"')
    with pytest.raises(SchemaNeeded):
        loaded.schemas.reader(7)
    loaded.schemas.load(7)
    assert loaded.schemas.reader(7)(b"\x02a") == "a"


def test_schema_that_can_not_be_read_is_refused_for_a_minute(loaded):
    loaded.answer(1, "nonsense")
    loaded.answer(2, "nonsense", "PROTOBUF")
    loaded.answer(3, "x", "XML")
    for schema_id in (1, 2, 3):
        for _ in range(3):
            loaded.schemas.load(schema_id)
            with pytest.raises(DecodeError, match=f"schema {schema_id}"):
                loaded.schemas.reader(schema_id)
        assert loaded.asked(schema_id) == 1
    loaded.time += UNKNOWN_SECONDS
    loaded.answer(2, (TOPICS / "report.proto").read_text(), "PROTOBUF")  # as if what it imports had come
    with pytest.raises(SchemaNeeded):
        loaded.schemas.reader(2)
    loaded.schemas.load(2)
    assert loaded.schemas.report_reader(2)


def test_forged_ids_do_not_keep_the_registry_busy(loaded):
    for schema_id in range(1000, 2000):
        loaded.schemas.load(schema_id)
    assert loaded.stub.requests.total() == UNKNOWN_AT_ONCE
    loaded.answer(1, '"string"')
    loaded.schemas.load(1)
    with pytest.raises(DecodeError, match=r"was not asked for schema 1: .* redrive"):
        loaded.schemas.reader(1)
    loaded.time += 1
    with pytest.raises(SchemaNeeded):
        loaded.schemas.reader(1)
    loaded.schemas.load(1)
    for schema_id in range(2000, 3000):
        loaded.schemas.load(schema_id)
    assert loaded.stub.requests.total() == UNKNOWN_AT_ONCE + 2
    assert loaded.schemas.reader(1)(b"\x02a") == "a"  # a known one never waits


def test_schemas_that_exist_are_loaded_however_many_at_once(loaded):
    for schema_id in range(1, 51):
        loaded.answer(schema_id, '"string"')
        loaded.schemas.load(schema_id)
        assert loaded.schemas.reader(schema_id)(b"\x02a") == "a"


def test_outage_is_remembered_as_nothing(loaded):
    loaded.stub.default = (503, "")
    with pytest.raises(ServiceUnavailable):
        loaded.schemas.load(1)
    for schema_id in range(2, 30):  # an outage is no sign of forged ids
        with pytest.raises(ServiceUnavailable):
            loaded.schemas.load(schema_id)
    with pytest.raises(SchemaNeeded):
        loaded.schemas.reader(1)
    loaded.answer(1, '"string"')
    loaded.schemas.load(1)
    assert loaded.schemas.reader(1)(b"\x02a") == "a"


def test_machine_that_can_not_compile_now_is_remembered_as_nothing(loaded, monkeypatch, tmp_path):
    loaded.answer(1, (TOPICS / "report.proto").read_text(), "PROTOBUF")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(ServiceUnavailable):
        loaded.schemas.load(1)
    monkeypatch.undo()
    loaded.schemas.load(1)
    assert loaded.schemas.report_reader(1)(b"\0" + write_protobuf_report(REPORT)) == REPORT


def test_ids_however_many_do_not_fill_the_memory(loaded, monkeypatch):
    monkeypatch.setattr(schemas_module, "MAX_REFUSED", 10)
    monkeypatch.setattr(schemas_module, "MAX_SCHEMAS", 10)
    for schema_id in range(1, 26):
        loaded.answer(schema_id, '"string"')
    for schema_id in range(1, 51):
        loaded.schemas.load(schema_id)
        loaded.time += 1
    assert len(loaded.schemas._readers) <= 10
    assert len(loaded.schemas._refused) <= 10
    assert len(loaded.schemas._registry._client._cache.schema_id_index) == 0
    loaded.schemas.load(1)  # forgotten, and asked for anew
    assert loaded.schemas.reader(1)(b"\x02a") == "a"


def test_report_of_our_own_schemas_is_read_directly(loaded):
    loaded.answer(1, (TOPICS / "report.avsc").read_text())
    loaded.answer(2, (TOPICS / "report.proto").read_text(), "PROTOBUF")
    loaded.answer(3, (TOPICS / "report.schema.json").read_text(), "JSON")
    payloads = {
        1: write_avro_report(REPORT),
        2: b"\0" + write_protobuf_report(REPORT),
        3: b'{"agent_id": "a", "entries": [{"key": "k", "value": "v"}]}',
    }
    for schema_id, payload in payloads.items():
        loaded.schemas.load(schema_id)
        assert loaded.schemas.report_reader(schema_id)(payload) == REPORT
        assert loaded.schemas.reader(schema_id)(payload)["agent_id"] == "a"
        with pytest.raises(DecodeError):
            loaded.schemas.report_reader(schema_id)(b"\xff")


@pytest.mark.parametrize("indexes", [b"\0", b"\2\0", b"\x82\0\x80\0", b"\x80\0"])
def test_first_message_is_read_directly_however_it_is_spelled(loaded, indexes):
    loaded.answer(1, (TOPICS / "report.proto").read_text(), "PROTOBUF")
    loaded.schemas.load(1)
    payload = indexes + write_protobuf_report(REPORT)
    assert loaded.schemas.report_reader(1)(payload) == REPORT
    assert convert_report(loaded.schemas.reader(1)(payload)).entries[0].value == "v"


def test_other_message_of_a_reports_schema_is_left_to_its_reader(loaded):
    text = (TOPICS / "report.proto").read_text() + "message Other { string agent_id = 1; repeated Entry entries = 3; }"
    loaded.answer(1, text, "PROTOBUF")
    loaded.schemas.load(1)
    payload = b"\2\4" + write_protobuf_report(REPORT)
    with pytest.raises(DecodeError, match="not the first message"):
        loaded.schemas.report_reader(1)(payload)
    assert convert_report(loaded.schemas.reader(1)(payload)).agent_id == "a"


def test_report_of_a_foreign_schema_is_not_read_directly(loaded):
    schema = json.loads((TOPICS / "report.avsc").read_text())
    schema["fields"][0]["type"] = "long"
    loaded.answer(1, json.dumps(schema))
    loaded.schemas.load(1)
    assert loaded.schemas.report_reader(1) is None


def test_json_is_read_with_lone_surrogates_replaced():
    assert read_json(b'{"a": [1, "\\ud800"]}') == {"a": [1, "\ufffd"]}
    for payload in (b"", b"{", b"\xff", b"[" * 100_000, b"NaN", b'"\\ud800', b"\xef\xbb\xbf1"):
        with pytest.raises(DecodeError, match="not JSON"):
            read_json(payload)
