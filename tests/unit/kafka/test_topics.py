"""The topics' declarations, and their JSON Schemas against what the code writes and reads."""

import json
import tomllib
import uuid
from datetime import UTC, datetime
from typing import get_args

import jsonschema
import pytest

from pipeline.core.batch import (
    MAX_COLUMNS_BYTES,
    Batch,
    Reason,
    Row,
    Source,
    WindowSpan,
    decode_batch,
    encode_batch,
    split,
)
from pipeline.core.report import MAX_KEY_CHARS, Entry, Report, decode_report, encode_report
from pipeline.data_files import data_dir
from pipeline.errors import DecodeError, TopicMismatch
from pipeline.kafka.topics import TopicFacts, load_topic_specs, require_equal_partitions

A1 = str(uuid.UUID(int=1))
DAY_MS = 86_400_000


def schema(name):
    return json.loads((data_dir("topics") / name).read_text(encoding="utf-8"))


def validator(name):
    jsonschema.Draft202012Validator.check_schema(schema(name))
    checker = jsonschema.FormatChecker()
    return jsonschema.Draft202012Validator(schema(name), format_checker=checker)


def a_batch(**changes):
    rows = [Row(A1, "cpu", "12%", "", 1_704_067_200_000_000), Row(A1, "disk", "", "no such disk", -1)]
    (batch,) = split(
        rows, source=Source("events", "id", 3, 5, 9), window=WindowSpan(0, 1), reason="revoked", batch_size=500
    )
    return {**json.loads(encode_batch(batch)), **changes}


def test_specs_are_the_three_topics_by_role():
    assert {role: spec.name for role, spec in load_topic_specs().items()} == {
        "events": "agent-metadata.events.v1",
        "batches": "agent-metadata.batches.v1",
        "dead_letter": "agent-metadata.dead-letter.v1",
    }


def test_specs_say_purpose_and_key_and_why_each_choice_was_made():
    for spec in load_topic_specs().values():
        assert spec.purpose
        assert spec.key
        assert set(spec.why) == {*spec.config, "partitions"}


def test_specs_keep_history_and_let_the_broker_stamp_what_the_pipeline_reads():
    specs = load_topic_specs()
    assert {spec.config["cleanup.policy"] for spec in specs.values()} == {"delete"}
    assert {specs[role].config["message.timestamp.type"] for role in ("events", "batches")} == {"LogAppendTime"}
    days = {role: int(spec.config["retention.ms"]) / DAY_MS for role, spec in specs.items()}
    assert days == {"events": 7, "batches": 7, "dead_letter": 30}


def test_specs_take_the_largest_batch_and_dead_letters_larger_than_any_event():
    largest = {role: int(spec.config["max.message.bytes"]) for role, spec in load_topic_specs().items()}
    assert largest["batches"] > MAX_COLUMNS_BYTES + 100_000
    assert largest["dead_letter"] > largest["events"]


def test_specs_declare_equal_partitions_for_events_and_batches():
    specs = load_topic_specs()
    assert {role: spec.partitions for role, spec in specs.items()} == {"events": 8, "batches": 8, "dead_letter": 1}


def test_specs_partitions_given_count_for_events_and_batches_only():
    specs = load_topic_specs(partitions=24)
    assert {role: spec.partitions for role, spec in specs.items()} == {"events": 24, "batches": 24, "dead_letter": 1}


def test_specs_names_given_rename_those_topics_only():
    specs = load_topic_specs(names={"events": "mine"})
    assert specs["events"].name == "mine"
    assert specs["batches"] == load_topic_specs()["batches"]


def test_declarations_name_schemas_that_exist():
    declared = [tomllib.loads(file.read_text(encoding="utf-8")) for file in data_dir("topics").glob("*.toml")]
    assert {topic["role"]: topic.get("schema") for topic in declared} == {
        "events": "report.schema.json",
        "batches": "batch.schema.json",
        "dead_letter": None,  # original bytes
    }


def test_unequal_partitions_are_refused_in_one_line_naming_both():
    events, batches = TopicFacts("events", "id-1", 8), TopicFacts("batches", "id-2", 4)
    with pytest.raises(TopicMismatch, match="events has 8 partitions and batches has 4") as caught:
        require_equal_partitions(events, batches)
    assert "\n" not in str(caught.value)


def test_equal_partitions_are_accepted():
    require_equal_partitions(TopicFacts("events", "id-1", 8), TopicFacts("batches", "id-2", 8))


@pytest.mark.parametrize(
    "report",
    [
        Report(A1, [Entry("cpu", "12%")]),
        Report(A1, [Entry("cpu", error="no such file", collected_at=datetime(2024, 1, 1, tzinfo=UTC))]),
        Report(A1, [], collected_at=datetime(2024, 1, 1, 1, 2, 3, 456789, tzinfo=UTC)),
    ],
)
def test_report_schema_takes_what_the_producer_encodes(report):
    validator("report.schema.json").validate(json.loads(encode_report(report)))


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"agent_id": A1},
        {"agent_id": None, "entries": []},
        {"agent_id": A1, "entries": [{"value": "a key is missing"}]},
        {"agent_id": A1, "entries": [{"key": 12, "value": "v"}]},
        {"agent_id": A1, "entries": {"k": "v"}},
    ],
)
def test_report_schema_and_decoder_refuse_the_same(wrong):
    with pytest.raises(jsonschema.ValidationError):
        validator("report.schema.json").validate(wrong)
    with pytest.raises(DecodeError):
        decode_report(json.dumps(wrong).encode())


def test_report_schema_has_the_fields_and_limits_of_the_code():
    report = schema("report.schema.json")["properties"]
    entry = report["entries"]["items"]["properties"]
    assert (set(report), set(entry)) == (set(Report.__struct_fields__), set(Entry.__struct_fields__))
    assert entry["key"]["maxLength"] == MAX_KEY_CHARS


def test_batch_schema_takes_what_the_worker_encodes():
    validator("batch.schema.json").validate(a_batch())


@pytest.mark.parametrize(
    "change",
    [
        {"version": 0},
        {"version": "2"},
        {"reason": 7},
        {"source": {"topic": "events", "partition": 3, "first": 5, "last": 9}},
        {"source": {"topic": "events", "topic_id": "id", "partition": -1, "first": 5, "last": 9}},
        {"window": {"start_us": 0}},
        {"collected_at_us": ["2024-01-01T00:00:00Z", 0]},
        {"keys": [1, 2]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_batch_schema_and_decoder_refuse_the_same(change):
    with pytest.raises(jsonschema.ValidationError):
        validator("batch.schema.json").validate(a_batch(**change))
    with pytest.raises(DecodeError):
        decode_batch(json.dumps(a_batch(**change)).encode())


def test_batch_schema_has_the_fields_and_reasons_of_the_code():
    batch = schema("batch.schema.json")
    assert {*batch["required"], "names"} == set(batch["properties"]) == set(Batch.__struct_fields__)
    assert set(batch["properties"]["source"]["required"]) == set(Source.__struct_fields__)
    assert set(batch["properties"]["window"]["required"]) == set(WindowSpan.__struct_fields__)
    assert set(batch["properties"]["reason"]["examples"]) == set(get_args(Reason))
