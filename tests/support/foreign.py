"""Records of other programs: samples of each envelope, generated ones, and what must hold for all of them."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from google.protobuf.json_format import ParseDict
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest

from pipeline.core.record import KafkaRecord
from pipeline.core.report import (
    BACKSLASH,
    MAX_TIMESTAMP_US,
    MIN_TIMESTAMP_US,
    PARSE_ERRORS,
    SHORT_BYTES,
    Report,
    apply_limits,
    timestamp_us,
)
from pipeline.errors import DecodeError
from pipeline.formats.mapping import CompiledMapping, MappingConfig
from pipeline.formats.mapping.paths import parse_path
from pipeline.formats.otlp import OtlpReader
from pipeline.formats.schemas import read_json

T0_MS = 1_767_323_045_678  # 2026-01-02T03:04:05.678Z

CLOUD_EVENT: dict[str, Any] = {
    "specversion": "1.0",
    "id": "b25e2717-a470-45a0-8231-985a99aa9416",
    "source": "/buildings/7/boiler",
    "type": "com.example.boiler.reading",
    "subject": "boiler-1",
    "time": "2026-01-02T03:04:05.678Z",
    "datacontenttype": "application/json",
    "data": {"temperature": 71.5, "pressure": 2, "burning": True, "fault": None, "valves": [1, 2]},
}
OF_CLOUD_EVENT: dict[str, Any] = {"id": "source", "time": "time", "entries": "data"}

# What Kafka Connect's JsonConverter writes with schemas.enable=true.
CONNECT: dict[str, Any] = {
    "schema": {
        "type": "struct",
        "fields": [
            {"type": "string", "optional": False, "field": "machine"},
            {"type": "double", "optional": True, "field": "load"},
            {"type": "int64", "optional": False, "name": "org.apache.kafka.connect.data.Timestamp", "field": "at"},
        ],
        "optional": False,
        "name": "machines",
    },
    "payload": {"machine": "press-4", "load": 0.75, "at": T0_MS},
}
OF_CONNECT: dict[str, Any] = {
    "id": "payload.machine",
    "time": "payload.at",
    "time_format": "milliseconds",
    "entries": "payload",
}

# What Debezium's Postgres connector writes, without schemas.
DEBEZIUM: dict[str, Any] = {
    "before": None,
    "after": {"id": 1004, "name": "press-4", "status": "running", "load": 0.75, "updated_at": 1_767_323_045_678_901},
    "source": {
        "version": "3.3.1.Final",
        "connector": "postgresql",
        "name": "fleet",
        "ts_ms": T0_MS,
        "snapshot": "false",
        "db": "fleet",
        "sequence": '["24023119","24023128"]',
        "ts_us": 1_767_323_045_678_901,
        "ts_ns": 1_767_323_045_678_901_000,
        "schema": "public",
        "table": "machines",
        "txId": 555,
        "lsn": 24023128,
        "xmin": None,
    },
    "transaction": None,
    "op": "c",
    "ts_ms": 1_767_323_046_001,
    "ts_us": 1_767_323_046_001_123,
    "ts_ns": 1_767_323_046_001_123_456,
}
DELETED: dict[str, Any] = {**DEBEZIUM, "op": "d", "before": DEBEZIUM["after"], "after": None}
OF_DEBEZIUM: dict[str, Any] = {
    "id": "after.id",
    "time": "source.ts_ms",
    "time_format": "milliseconds",
    "entries": "after",
}

LISTED: dict[str, Any] = {
    "device": "d-1",
    "sent": T0_MS / 1000,
    "readings": [{"name": "cpu", "reading": 12, "at": 1.5}, {"name": "disk", "failure": "timed out"}],
}
OF_LISTED: dict[str, Any] = {"id": "device", "entries": "readings", "key": "name", "value": "reading"}

MAPPINGS = [
    CompiledMapping(MappingConfig(**fields))
    for fields in (
        OF_CLOUD_EVENT,
        OF_CONNECT,
        OF_DEBEZIUM,
        {**OF_DEBEZIUM, "include": ["status", "load"]},
        {"id": "after.name", "key": "source.table", "value": "after.load", "error": "after.error", "time": "time"},
        {**OF_LISTED, "error": "failure", "entry_time": "at", "time": "sent", "time_format": "seconds"},
        {"id": "device", "entries": "readings", "value": "reading", "error": "failure"},
        {"id": ["device", "after.id"], "entries": "."},
        {"id": "header:id", "entries": "data"},
    )
]
METRICS: dict[str, Any] = {
    "resourceMetrics": [
        {
            "resource": {
                "attributes": [
                    {"key": "host.name", "value": {"stringValue": "web-1"}},
                    {"key": "host.cores", "value": {"intValue": "8"}},
                ]
            },
            "scopeMetrics": [
                {
                    "scope": {"name": "otelcol/hostmetricsreceiver/load", "version": "0.140.0"},
                    "metrics": [
                        {
                            "name": "system.memory.usage",
                            "unit": "By",
                            "sum": {
                                "dataPoints": [
                                    {
                                        "attributes": [{"key": "state", "value": {"stringValue": "used"}}],
                                        "timeUnixNano": "1767323045678901234",
                                        "asInt": "9663676416",
                                    }
                                ],
                                "aggregationTemporality": 2,
                            },
                        },
                        {
                            "name": "http.server.request.duration",
                            "histogram": {
                                "dataPoints": [{"count": "3", "sum": 0.75, "min": 0.1, "bucketCounts": ["1", "2"]}]
                            },
                        },
                        {
                            "name": "go_gc_duration_seconds",
                            "summary": {
                                "dataPoints": [{"count": "7", "sum": 1.5, "quantileValues": [{"quantile": 1}]}]
                            },
                        },
                        {"name": "load", "gauge": {"dataPoints": [{"asDouble": 0.62, "flags": 1}]}},
                    ],
                }
            ],
        }
    ]
}
METRICS_JSON = json.dumps(METRICS).encode()
METRICS_PROTO: bytes = ParseDict(METRICS, ExportMetricsServiceRequest()).SerializeToString()
OTLP_SEEDS = [METRICS_JSON, METRICS_PROTO]
_OTLP = [OtlpReader("otlp_json"), OtlpReader("otlp_proto")]
FOREIGN_VALUES = st.sampled_from(
    [
        *OTLP_SEEDS,
        *(json.dumps(value).encode() for value in (CLOUD_EVENT, CONNECT, DEBEZIUM, DELETED, LISTED)),
    ]
)

# Few names, so that the paths of a mapping often lead somewhere.
_NAMES = st.sampled_from(["a", "b", "c", "k", "v", "e", "t", "0", "a.b"])
_TEXT = st.text(st.characters(exclude_categories=()), max_size=8)
_TIMES = st.sampled_from(
    ["2026-01-02T03:04:05.678Z", "0001-01-01T00:00:00+14:00", "2026-01-02", T0_MS, 1.5, "1.5", -1, 1e30]
)
_FLOATS = st.floats(allow_nan=False, allow_infinity=False)
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), _FLOATS, _TEXT, _TIMES)
_LONG = st.builds(lambda text, times: text * times, _TEXT, st.sampled_from([300, 2500]))
VALUES = st.recursive(
    _SCALARS | _LONG,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES | _TEXT, inner, max_size=6),
    max_leaves=20,
)
_PATHS = st.lists(_NAMES, min_size=1, max_size=3).map(
    lambda names: ".".join(f'"{name}"' if "." in name else name for name in names)
)
_FORMATS = st.sampled_from(["rfc3339", "seconds", "milliseconds", "microseconds", "nanoseconds"])


def _usual(*paths: str) -> st.SearchStrategy[str]:
    """Paths that rarely lead to the same place as another's; or any."""
    return st.one_of(*[st.sampled_from(paths)] * 4, _PATHS)


_ID = _usual("id", "b.id", "b.c.id")
_HEADS = st.fixed_dictionaries(
    {"id": _ID | st.sampled_from(["record:key", "header:h"]) | st.lists(_ID, min_size=1, max_size=2)}
)
_TIMED = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"time": _usual("time", "b.time", "d.time") | st.just("record:timestamp")}, optional={"time_format": _FORMATS}
    ),
)
_KEPT = st.one_of(
    st.just({}),
    st.just({}),
    st.fixed_dictionaries({"include": st.lists(_NAMES, min_size=1, max_size=3, unique=True)}),
    st.fixed_dictionaries({"exclude": st.lists(_NAMES, min_size=1, max_size=3)}),
)
_ENTRIES, _KEY, _VALUE = _usual("b", "b.list", "list"), _usual("k", "f.k"), _usual("v", "f.v", "g.v")
_RARE = {"error": _usual("e", "f.e", "g.e"), "entry_time": _usual("t", "g.t")}
_SHAPES = st.one_of(
    st.fixed_dictionaries({"entries": _ENTRIES | st.just(".")}),
    st.fixed_dictionaries({"entries": _ENTRIES, "value": _VALUE}, optional=_RARE),
    st.fixed_dictionaries({"entries": _ENTRIES, "key": _KEY, "value": _VALUE}, optional=_RARE),
    st.fixed_dictionaries({"key": _KEY, "value": _VALUE | st.just(".")}, optional={"error": _RARE["error"]}),
)
_PARTS = {
    "key": st.one_of(_NAMES, _TEXT, _SCALARS),
    "value": _SCALARS | VALUES,
    "error": st.one_of(st.none(), _TEXT, _SCALARS),
    "entry_time": _TIMES,
}


@st.composite
def mapped(draw: Any) -> tuple[dict[str, Any], bytes]:
    """A mapping, and a record that it fits more or less, in JSON."""
    fields = draw(_HEADS) | draw(_TIMED) | draw(_KEPT) | draw(_SHAPES)
    value = draw(st.dictionaries(_NAMES, VALUES, max_size=3))
    elements: list[dict[str, Any]] = [{}, {}]
    for element in elements[: draw(st.integers(1, 2))]:
        for name, part in _PARTS.items():
            if name in fields and draw(st.integers(0, 9)):
                put(element, fields[name], draw(part))
    if "key" not in fields:
        found: Any = (
            {"k": elements[0], "l": elements[0]} if "value" in fields else draw(st.dictionaries(_NAMES, _SCALARS))
        )
        put(value, fields["entries"], found)
    elif "entries" in fields:
        put(value, fields["entries"], elements[: draw(st.integers(0, 2))])
    else:
        value |= elements[0]
    for path in fields["id"] if isinstance(fields["id"], list) else [fields["id"]]:
        put(value, path, draw(st.sampled_from(["d-1", "d-1", 7, 7.5, "", None])))
    put(value, fields.get("time"), draw(_TIMES))
    return fields, json.dumps(value).encode()


def put(value: dict[str, Any], path: str | None, item: Any) -> None:
    """Put an item where a path leads to, as far as there are objects on the way."""
    if path is None or path == "." or ":" in path:
        return
    *above, last = parse_path(path).steps
    for name in above:
        inner = value.setdefault(name, {})
        if not isinstance(inner, dict):
            return
        value = inner
    value[last] = item


def check_mapping(mapping: CompiledMapping, raw: bytes) -> str:
    """Map a record both ways, which must agree, raising nothing but what they may; return "decoded" or "refused"."""
    record = KafkaRecord(0, T0_MS, b"key", raw, (("h", b"header"),))
    reports, is_json = None, False
    with contextlib.suppress(DecodeError):
        value = read_json(raw)
        is_json = True
        reports = mapping.reports(value, record)
    if mapping.parse is not None:
        try:
            fast = mapping.parse(raw)
        except (*PARSE_ERRORS, KeyError, DecodeError):
            pass
        else:
            if not is_json:  # in a part that the mapping does not name
                reports = [fast]
            assert reports is not None
            assert [_plain(fast)] == [_plain(report) for report in reports]
            if len(raw) <= SHORT_BYTES and BACKSLASH not in raw:
                before = _plain(fast)
                assert apply_limits(fast) is None
                assert _plain(fast) == before
    if reports is None:
        return "refused"
    _check_reports(reports)
    return "decoded"


def check_mappings(raw: bytes | None) -> str:
    """Map a record by each of the mappings above; "decoded" if one takes it."""
    return min(check_mapping(mapping, raw or b"") for mapping in MAPPINGS)


def check_otlp(raw: bytes | None) -> str:
    """Decode metrics in both encodings, raising nothing but DecodeError; "decoded" if either takes them."""
    outcomes = []
    for reader in _OTLP:
        try:
            _check_reports(reader.decode(raw).reports)
            outcomes.append("decoded")
        except DecodeError:
            outcomes.append("refused")
    return min(outcomes)


def _plain(report: Report) -> tuple[Any, ...]:
    entries = [(entry.key, entry.value, entry.error, entry.collected_at) for entry in report.entries]
    return report.agent_id, entries, report.collected_at


def _check_reports(reports: Any) -> None:
    for report in reports:
        assert isinstance(report.agent_id, str)
        apply_limits(report)
        for entry in report.entries:
            assert "\0" not in (entry.key + entry.value + entry.error).encode().decode()
            for moment in (report.collected_at, entry.collected_at):
                assert moment is None or MIN_TIMESTAMP_US <= timestamp_us(moment) <= MAX_TIMESTAMP_US
