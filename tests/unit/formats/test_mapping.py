"""Mapping: what records of other programs become, and which mappings are refused."""

import json
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from pydantic import ValidationError

from pipeline.core.record import KafkaRecord
from pipeline.core.report import PARSE_ERRORS
from pipeline.core.window import OpenWindow
from pipeline.errors import DecodeError
from pipeline.formats.decoder import EventsDecoder
from pipeline.formats.mapping import CompiledMapping, MappingConfig
from tests.support.foreign import (
    CLOUD_EVENT,
    CONNECT,
    DEBEZIUM,
    OF_CLOUD_EVENT,
    OF_CONNECT,
    OF_DEBEZIUM,
    OF_LISTED,
    T0_MS,
)

T0 = datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)


def mapping(**fields):
    return CompiledMapping(MappingConfig(**fields))


def record(value=None, key=None, headers=()):
    return KafkaRecord(0, T0_MS, key, value, tuple(headers))


def shown(report):
    return (
        report.agent_id,
        {entry.key: (entry.value, entry.error) for entry in report.entries},
        report.collected_at,
    )


def both(config, value, **more):
    """Map a value the careful way and, if there is one, the fast way, which must agree; return the only report."""
    compiled = mapping(**config)
    raw = json.dumps(value).encode()
    (report,) = compiled.reports(json.loads(raw), record(raw, **more))
    if compiled.parse is not None:
        fast = compiled.parse(raw)
        assert shown(fast) == shown(report)
        assert [entry.collected_at for entry in fast.entries] == [entry.collected_at for entry in report.entries]
    return report


def refusal(config, value, **more):
    """Return why a value is a dead letter; the fast way must not take it either."""
    compiled = mapping(**config)
    if compiled.parse is not None:
        with pytest.raises((*PARSE_ERRORS, DecodeError, KeyError)):
            compiled.parse(json.dumps(value).encode())
    with pytest.raises(DecodeError) as refused:
        compiled.reports(value, record(**more))
    return str(refused.value)


CLOUD_EVENT_VALUES = {
    "temperature": ("71.5", ""),
    "pressure": ("2", ""),
    "burning": ("true", ""),
    "fault": ("", ""),
    "valves": ("[1,2]", ""),
}


def test_cloud_event_in_structured_mode():
    report = both(OF_CLOUD_EVENT, CLOUD_EVENT)
    assert shown(report) == ("/buildings/7/boiler", CLOUD_EVENT_VALUES, T0)


def test_cloud_event_in_binary_mode():
    headers = [
        ("ce_specversion", b"1.0"),
        ("ce_source", b"/buildings/7/boiler"),
        ("ce_time", b"2026-01-02T03:04:05.678Z"),
        ("content-type", b"application/json"),
    ]
    config = {"id": "header:ce_source", "time": "header:ce_time", "entries": "."}
    assert mapping(**config).parse is None  # it needs more than the value
    report = both(config, CLOUD_EVENT["data"], headers=headers)
    assert shown(report) == ("/buildings/7/boiler", CLOUD_EVENT_VALUES, T0)


def test_connect_json_with_its_schema():
    assert shown(both(OF_CONNECT, CONNECT)) == ("press-4", {"load": ("0.75", "")}, T0)


@pytest.mark.parametrize("op", ["c", "u", "r"])
def test_debezium_row_that_was_written_or_read_by_a_snapshot(op):
    report = both({**OF_DEBEZIUM, "exclude": ["name", "updated_at"]}, {**DEBEZIUM, "op": op})
    assert shown(report) == ("1004", {"status": ("running", ""), "load": ("0.75", "")}, T0)


def test_debezium_row_with_its_schema_and_some_columns_only():
    config = {
        "id": "payload.after.name",
        "time": "payload.after.updated_at",
        "time_format": "microseconds",
        "entries": "payload.after",
        "include": ["load", "gone"],
    }
    report = both(config, {"schema": {"type": "struct"}, "payload": DEBEZIUM})
    assert shown(report) == ("press-4", {"load": ("0.75", "")}, T0.replace(microsecond=678901))


@pytest.mark.parametrize(
    "config",
    [
        OF_DEBEZIUM,
        {**OF_DEBEZIUM, "include": ["load"]},
        {"id": "after.id", "key": "after.name", "value": "after.load"},
        {"id": "after.id", "entries": "after.readings", "key": "name", "value": "value"},
        {"id": "header:id", "entries": "after"},
    ],
)
@pytest.mark.parametrize(
    "value",
    [
        None,  # a tombstone
        {**DEBEZIUM, "op": "d", "before": DEBEZIUM["after"], "after": None},
        {**DEBEZIUM, "op": "t", "after": None},
    ],
    ids=["tombstone", "delete", "truncate"],
)
def test_debezium_row_that_was_deleted_is_no_report_and_no_dead_letter(config, value):
    compiled = mapping(**config)
    assert compiled.reports(value, record()) == []
    if compiled.parse is not None:
        with pytest.raises((*PARSE_ERRORS, DecodeError, KeyError)):
            compiled.parse(json.dumps(value).encode())


def test_entries_as_a_list_with_errors_and_times_of_their_own():
    report = both(
        {**OF_LISTED, "error": "failure", "entry_time": "at", "time_format": "seconds", "time": "sent"},
        {
            "device": "d-1",
            "sent": T0_MS / 1000,
            "readings": [
                {"name": "cpu", "reading": 12, "at": 1.5},
                {"name": "disk", "failure": "timed out"},
                {"name": "fan", "reading": None, "failure": None, "at": None},
                {"name": "net", "reading": {"up": 1}, "failure": "half", "at": "-1"},
            ],
        },
    )
    assert shown(report) == (
        "d-1",
        {"cpu": ("12", ""), "disk": ("", "timed out"), "fan": ("", ""), "net": ('{"up":1}', "half")},
        T0,
    )
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    assert [entry.collected_at for entry in report.entries] == [
        epoch + timedelta(seconds=1.5),
        None,
        None,
        epoch - timedelta(seconds=1),
    ]


def test_entries_as_a_list_with_deeper_paths_and_keys_left_out():
    report = both(
        {
            "id": "meta.device",
            "entries": "meta.readings",
            "key": "of.name",
            "value": "reading.value",
            "error": "reading.state.error",
            "exclude": ["secret"],
        },
        {
            "meta": {
                "device": "d-1",
                "readings": [
                    {"of": {"name": "cpu"}, "reading": {"value": 12}},
                    {"of": {"name": "disk"}, "reading": {"state": {"error": "gone"}}},
                    {"of": {"name": "secret"}, "reading": {"value": "x"}},
                ],
            }
        },
    )
    assert shown(report) == ("d-1", {"cpu": ("12", ""), "disk": ("", "gone")}, None)


def test_entries_as_an_object_of_values_or_of_objects_with_value_and_error():
    report = both(
        {"id": "device", "entries": "state", "value": "v", "error": "e", "entry_time": "at"},
        {
            "device": "d-1",
            "state": {
                "cpu": {"v": 12, "at": "2026-01-02T03:04:05.678Z"},
                "disk": {"e": "gone"},
                "fan": "on",
                "x": None,
            },
        },
    )
    assert shown(report) == (
        "d-1",
        {"cpu": ("12", ""), "disk": ("", "gone"), "fan": ("on", ""), "x": ("", "")},
        None,
    )
    assert report.entries[0].collected_at == T0


def test_flat_object_leaves_out_the_fields_that_id_and_time_are_read_from():
    value = {"id": "d-1", "ts": "2026-01-02T03:04:05.678Z", "cpu": 12, "nested": {"a": [1.5, None]}}
    report = both({"id": "id", "time": "ts", "entries": "."}, value)
    assert shown(report) == ("d-1", {"cpu": ("12", ""), "nested": ('{"a":[1.5,null]}', "")}, T0)
    report = both({"id": "id", "time": "ts", "entries": ".", "include": ["id", "cpu"]}, value)
    assert shown(report) == ("d-1", {"id": ("d-1", ""), "cpu": ("12", "")}, T0)


def test_record_as_one_entry():
    config = {
        "id": ["site", "machine"],
        "key": "tag",
        "value": "val",
        "error": "err",
        "time": "t",
        "time_format": "nanoseconds",
    }
    value = {"site": "north", "machine": 7, "tag": "rpm", "val": 1e300, "t": T0_MS * 1_000_000}
    assert shown(both(config, value)) == ("north/7", {"rpm": ("1e300", "")}, T0)
    assert shown(both({**config, "id_separator": ":", "include": ["load"]}, value)) == ("north:7", {}, T0)


def test_record_key_and_headers_give_what_the_value_lacks():
    config = {"id": "record:key", "key": "header:metric", "value": ".", "time": "record:timestamp"}
    report = both(config, 21.5, key=b"sensor-1", headers=[("metric", b"old"), ("metric", b"temperature")])
    assert shown(report) == ("sensor-1", {"temperature": ("21.5", "")}, None)


def test_path_through_quoted_names_and_a_list():
    config = {"id": 'resource."host.name"', "key": "samples.0.name", "value": "samples.1"}
    value = {"resource": {"host.name": "web-1"}, "samples": [{"name": "cpu"}, "12"]}
    assert shown(both(config, value)) == ("web-1", {"cpu": ("12", "")}, None)


def test_objects_of_other_formats_have_values_json_has_not():
    zone = timezone(timedelta(hours=14))
    value = {"id": b"\1\2", "at": T0.astimezone(zone), "cpu": Decimal("1.50"), "raw": b"\xff", "when": T0}
    (report,) = mapping(id="id", time="at", time_format="seconds", entries=".").reports(value, record())
    assert shown(report) == (
        "AQI=",
        {"cpu": ("1.50", ""), "raw": ("/w==", ""), "when": ("2026-01-02T03:04:05.678000Z", "")},
        T0,
    )


NO_PATHS = ("", "a..b", "a.", ".a", "$.a", "a[0]", 'a."b', "a b", "x:y", '"a"b', "record:offset")
WHOLE = {"device": "d-1", "readings": [{"name": "cpu", "reading": 12}]}


@pytest.mark.parametrize(
    ("config", "value", "reason"),
    [
        (OF_LISTED, {**WHOLE, "device": None}, "id, at device: null"),
        (OF_LISTED, {**WHOLE, "device": ""}, "id, at device: ''"),
        (OF_LISTED, {**WHOLE, "device": {"a": 1}}, "id, at device: an object"),
        (OF_LISTED, {**WHOLE, "device": True}, "id, at device: True"),
        ({**OF_LISTED, "id": "a.b"}, WHOLE, "id, at a.b: missing"),
        ({**OF_LISTED, "id": ["device", "site"]}, WHOLE, "id, at site: missing"),
        ({**OF_LISTED, "id": ["device", "site"]}, {**WHOLE, "site": ""}, "id, at site: ''"),
        ({**OF_LISTED, "id": "header:id"}, WHOLE, "id, at header:id: missing"),
        ({**OF_LISTED, "id": "record:key"}, WHOLE, "id, at record:key: missing"),
        (OF_LISTED, {"device": "d-1"}, "entries, at readings: missing, not a list"),
        (OF_LISTED, {**WHOLE, "readings": {}}, "entries, at readings: an object, not a list"),
        (OF_LISTED, {**WHOLE, "readings": [None]}, "entries, at readings: [0] is null, not an object"),
        (OF_LISTED, {**WHOLE, "readings": [{"reading": 1}]}, "key, at name in [0]: missing"),
        (OF_LISTED, {**WHOLE, "readings": [{"name": None, "reading": 1}]}, "key, at name in [0]: null"),
        (OF_LISTED, {**WHOLE, "readings": [{"name": "cpu"}]}, "value, at reading in [0]: missing"),
        ({**OF_LISTED, "error": "err"}, {**WHOLE, "readings": [{"name": "k"}]}, "value, at reading in [0]: missing"),
        (
            {**OF_LISTED, "time": "at"},
            {**WHOLE, "at": "2026-01-02T03:04:05"},
            "time, at at: '2026-01-02T03:04:05' is no",
        ),
        ({**OF_LISTED, "time": "at"}, {**WHOLE, "at": 12}, "time, at at: 12 is no time in RFC 3339"),
        (
            {**OF_LISTED, "time": "at", "time_format": "seconds"},
            {**WHOLE, "at": "noon"},
            "'noon' is no number of seconds",
        ),
        ({**OF_LISTED, "time": "at", "time_format": "seconds"}, {**WHOLE, "at": 10**20}, "outside the years 1 to 9999"),
        ({**OF_LISTED, "time": "at", "time_format": "seconds"}, {**WHOLE, "at": True}, "no number of seconds"),
        (
            {**OF_LISTED, "entry_time": "t"},
            {**WHOLE, "readings": [{"name": "k", "reading": 1, "t": "x"}]},
            "entry_time, at t in [0]",
        ),
        ({"id": "device", "entries": "readings"}, WHOLE, "entries, at readings: a list, not an object"),
        (
            {"id": "device", "entries": "x", "value": "v"},
            {"device": "d", "x": {"k": {"w": 1}}},
            "value, at v in ['k']: missing",
        ),
        ({"id": "device", "key": "k", "value": "v"}, {"device": "d", "v": 1}, "key, at k: missing"),
        ({"id": "device", "entries": "."}, [1], "entries, at .: a list, not an object"),
    ],
)
def test_record_that_does_not_fit_is_a_dead_letter_that_names_the_path(config, value, reason):
    found = refusal(config, value)
    assert found.startswith("the record does not fit [mapping]: ")
    assert reason in found


def test_header_or_record_key_that_is_not_utf8_is_a_dead_letter():
    assert "header:id is not UTF-8" in refusal({**OF_LISTED, "id": "header:id"}, WHOLE, headers=[("id", b"\xff")])
    assert "record:key is not UTF-8" in refusal({**OF_LISTED, "id": "record:key"}, WHOLE, key=b"\xff")


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"entries": "a"}, "Field required"),
        ({"id": [], "entries": "a"}, "must be a path"),
        ({"id": "a"}, "say where the entries are"),
        ({"id": "a", "key": "k"}, "say where the entries are"),
        ({"id": "a", "key": "k", "value": "v", "entry_time": "t"}, "use time"),
        ({"id": "a", "entries": "e", "key": "k"}, "key without value"),
        ({"id": "a", "entries": "e", "error": "e"}, "error and entry_time need value"),
        ({"id": "a", "entries": "e", "include": ["a"], "exclude": ["b"]}, "exclude each other"),
        ({"id": "a", "entries": "e", "include": []}, "at least 1 item"),
        ({"id": "a", "entries": "e", "time_format": "seconds"}, "time_format without time"),
        ({"id": "a", "entries": "e", "time": "t", "time_format": "unix"}, "'rfc3339'"),
        ({"id": "a", "entries": "header:x"}, "is a header, but entries is read from the record's value"),
        (
            {"id": "a", "entries": "e", "key": "record:key", "value": "v"},
            "is the record key, but key is read from each",
        ),
        ({"id": "a", "entries": "e", "key": ".", "value": "v"}, "name the field that holds the key"),
        ({"id": "record:timestamp", "entries": "e"}, "id can't be the record's timestamp"),
        ({"id": "a", "key": "record:timestamp", "value": "v"}, "key can't be the record's timestamp"),
        ({"id": "a", "entries": "e", "keys": "k"}, "Extra inputs"),
        *(({"id": path, "entries": "e"}, "is not a path") for path in NO_PATHS),
        ({"id": "header:", "entries": "e"}, "lacks the header's name"),
    ],
)
def test_mapping_that_fits_no_record_is_refused(config, problem):
    with pytest.raises(ValidationError) as refused:
        MappingConfig(**config)
    assert problem in str(refused.value)


@pytest.mark.parametrize(
    "config",
    [
        OF_LISTED,
        {"id": "source", "time": "time", "entries": "data"},
        OF_DEBEZIUM,
        {**OF_DEBEZIUM, "include": ["load"]},
        {"id": "id", "entries": "."},
        {"id": "after.id", "key": "after.name", "value": "after.load"},
    ],
)
def test_usual_mappings_have_a_fast_way(config):
    assert mapping(**config).parse is not None


def test_record_becomes_the_same_whether_its_agent_is_known_or_not():
    """What the mapping does not name may be no JSON: the fast way skips it, and the careful way must not refuse it."""
    raw = b'{"source": "a", "ignored": "\xff", "more": 1e999, "data": {"k": 1}}'
    decoder = EventsDecoder(None, mapping(id="source", entries="data"))
    window = OpenWindow(0, capacity=9, max_clock_skew=timedelta(0), decoder=decoder)
    for offset in range(2):  # at first the agent is new
        window.fold([record(raw)._replace(offset=offset)])
    closed = window.close("scheduled", 1)
    assert (closed.entries, closed.rejected, [row.value for row in closed.rows]) == (2, [], ["1"])
