"""Metrics of an OpenTelemetry Collector, in both of its encodings: resources are agents, metrics keys."""

import json
import tracemalloc
from datetime import UTC, datetime

import pytest
from google.protobuf import json_format
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from pydantic import ValidationError

from pipeline.core.report import MAX_REPORT_KEYS_BYTES
from pipeline.errors import DecodeError
from pipeline.formats.otlp import OtlpConfig, OtlpReader

T0 = datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
NANOS = "1767323045678901234"


def attributes(**texts):
    return [{"key": name.replace("_", "."), "value": {"stringValue": text}} for name, text in texts.items()]


def point(value, **texts):
    return {
        "attributes": attributes(**texts),
        "startTimeUnixNano": "1767320000000000000",
        "timeUnixNano": NANOS,
        **value,
    }


def resource(metrics, **texts):
    """What a Collector writes for one resource; hostmetrics has one scope for each of its scrapers."""
    return {
        "resource": {"attributes": attributes(**texts)},
        "scopeMetrics": [
            {"scope": {"name": "otelcol/hostmetricsreceiver", "version": "0.140.0"}, "metrics": [metric]}
            for metric in metrics
        ],
        "schemaUrl": "https://opentelemetry.io/schemas/1.9.0",
    }


MEMORY = {
    "name": "system.memory.usage",
    "description": "Bytes of memory in use.",
    "unit": "By",
    "sum": {
        "dataPoints": [point({"asInt": "9663676416"}, state="used"), point({"asInt": "-1"}, state="free")],
        "aggregationTemporality": 2,
    },
}
LOAD = {"name": "system.cpu.load_average.1m", "unit": "{thread}", "gauge": {"dataPoints": [point({"asDouble": 0.62})]}}
HOST = {"host_name": "web-1", "os_type": "linux"}
DURATION = {
    "name": "http.server.request.duration",
    "unit": "s",
    "histogram": {
        "dataPoints": [
            point(
                {
                    "count": "3",
                    "sum": 0.75,
                    "min": 0.1,
                    "max": 0.5,
                    "bucketCounts": ["1", "2"],
                    "explicitBounds": [0.25],
                    "exemplars": [{"timeUnixNano": NANOS, "asDouble": 0.5, "traceId": "5b8efff7"}],
                },
                http_route="/",
            )
        ],
        "aggregationTemporality": 2,
    },
}
SIZE = {
    "name": "size",
    "exponentialHistogram": {
        "dataPoints": [
            point({"count": "2", "scale": 1, "zeroCount": "1", "positive": {"offset": 1, "bucketCounts": ["1"]}})
        ],
        "aggregationTemporality": 1,
    },
}
GC = {
    "name": "go_gc_duration_seconds",
    "summary": {
        "dataPoints": [
            point(
                {
                    "count": "7",
                    "sum": 1.5,
                    "quantileValues": [{"quantile": 0, "value": 0.1}, {"quantile": 0.5, "value": 0.2}],
                }
            )
        ]
    },
}


def decode(*resources, **config):
    """Decode the resources in both encodings, which must agree."""
    raw = json.dumps({"resourceMetrics": resources}).encode()
    options = OtlpConfig(**config)
    message = json_format.Parse(raw, ExportMetricsServiceRequest(), ignore_unknown_fields=True)
    from_json, from_proto = OtlpReader("otlp_json", options), OtlpReader("otlp_proto", options)
    decoded = from_json.decode(raw)
    assert decoded == from_proto.decode(message.SerializeToString())
    return decoded


def values(report):
    return {entry.key: entry.value for entry in report.entries}


def test_host_metrics_become_an_agent_with_a_key_for_each_set_of_attributes():
    (report,), problem = decode(resource([MEMORY, LOAD], **HOST))
    assert (report.agent_id, problem) == ("web-1", None)
    assert values(report) == {
        "system.memory.usage{state=used}": "9663676416",
        "system.memory.usage{state=free}": "-1",
        "system.cpu.load_average.1m": "0.62",
    }
    assert {entry.collected_at for entry in report.entries} == {T0}


def test_histograms_and_summaries_become_json_without_their_buckets():
    (report,), _ = decode(resource([DURATION, SIZE, GC], **HOST))
    assert {key: json.loads(value) for key, value in values(report).items()} == {
        "http.server.request.duration{http.route=/}": {"count": 3, "sum": 0.75, "min": 0.1, "max": 0.5},
        "size": {"count": 2},
        "go_gc_duration_seconds": {"count": 7, "sum": 1.5, "quantiles": {"0.0": 0.1, "0.5": 0.2}},
    }


def test_point_without_a_value_empties_the_row_and_one_without_a_time_has_none():
    gone = {"name": "up", "gauge": {"dataPoints": [point({"flags": 1})]}}
    timeless = {"name": "temp", "gauge": {"dataPoints": [{"asDouble": "NaN"}]}}
    (report,), _ = decode(resource([gone, timeless], **HOST))
    assert values(report) == {"up": "", "temp": "NaN"}
    assert [entry.collected_at for entry in report.entries] == [T0, None]


@pytest.mark.parametrize(
    ("texts", "agent"),
    [
        ({"host_name": "web-1", "host_id": "i-1", "service_instance_id": "s-1"}, "s-1"),
        ({"host_name": "web-1", "host_id": "i-1", "service_instance_id": ""}, "i-1"),
        ({"host_name": "web-1"}, "web-1"),
    ],
)
def test_agent_is_the_first_attribute_that_the_resource_has(texts, agent):
    (report,), _ = decode(resource([LOAD], **texts))
    assert report.agent_id == agent


def test_agent_is_the_attribute_that_the_settings_name():
    (report,), _ = decode(resource([LOAD], **HOST, k8s_pod_uid="0b2c"), id=["k8s.pod.uid"])
    assert report.agent_id == "0b2c"


def test_resource_without_an_id_is_left_out_and_the_others_are_taken():
    nameless = resource([LOAD], os_type="linux")
    reports, problem = decode(resource([LOAD], **HOST), nameless, resource([LOAD], host_id="i-2"))
    assert [report.agent_id for report in reports] == ["web-1", "i-2"]
    assert "without an id: it has none of the attributes service.instance.id, host.id, host.name" in problem
    with pytest.raises(DecodeError, match="a resource without an id"):
        decode(nameless)


def test_attributes_that_are_not_for_keys_are_left_out():
    metric = {"name": "m", "gauge": {"dataPoints": [point({"asInt": "1"}, b="2", a="1", secret="3")]}}
    assert list(values(decode(resource([metric], **HOST), exclude=["secret"])[0][0])) == ["m{a=1,b=2}"]
    assert list(values(decode(resource([metric], **HOST), include=["a"])[0][0])) == ["m{a=1}"]
    assert list(values(decode(resource([metric], **HOST), include=[])[0][0])) == ["m"]


def test_attributes_of_every_type_become_text():
    typed = [
        {"key": "b", "value": {"boolValue": False}},
        {"key": "i", "value": {"intValue": "-7"}},
        {"key": "d", "value": {"doubleValue": 1.5}},
        {"key": "l", "value": {"arrayValue": {"values": [{"intValue": "1"}, {"stringValue": "x"}]}}},
        {"key": "o", "value": {"kvlistValue": {"values": [{"key": "k", "value": {"stringValue": "v"}}]}}},
        {"key": "r", "value": {"bytesValue": "AQI="}},
        {"key": "n", "value": {}},
    ]
    metric = {"name": "m", "gauge": {"dataPoints": [{"attributes": typed, "asInt": "1"}]}}
    (report,), _ = decode(resource([metric], **HOST))
    assert list(values(report)) == ['m{b=false,d=1.5,i=-7,l=[1,"x"],n=,o={"k":"v"},r=AQI=}']


def test_resource_with_more_keys_than_a_report_may_have_becomes_several_reports():
    metrics = [
        {"name": f"{number:05}" + "m" * 95, "gauge": {"dataPoints": [point({"asInt": "1"})]}} for number in range(200)
    ]
    reports, problem = decode(resource(metrics, **HOST))
    assert (len(reports), problem) == (4, None)
    assert sum(len(report.entries) for report in reports) == 200
    assert all(sum(len(entry.key) for entry in report.entries) <= MAX_REPORT_KEYS_BYTES for report in reports)


def test_key_that_is_too_long_is_left_out_and_the_others_are_taken():
    long_name = {"name": "n" * 128, "gauge": {"dataPoints": [point({"asInt": "1"}, a="1")] * 2}}
    long_key = {"name": "m", "gauge": {"dataPoints": [point({"asInt": "1"}, a="x" * 123), point({"asInt": "2"})]}}
    (report,), problem = decode(resource([LOAD, long_name], **HOST))
    assert (list(values(report)), problem) == ([LOAD["name"]], f"key of 128 characters exceeds 127: {'n' * 32!r}...")
    reports, problem = decode(resource([long_key, LOAD], **HOST), resource([LOAD], host_name="web-2"))
    assert [list(values(report)) for report in reports] == [["m", LOAD["name"]], [LOAD["name"]]]
    assert problem == f"key of 128 characters exceeds 127: {'m{a=' + 'x' * 28!r}..."


def test_long_name_that_has_no_points_is_no_problem():
    (report,), problem = decode(resource([LOAD, {"name": "n" * 128, "gauge": {"dataPoints": []}}], **HOST))
    assert (list(values(report)), problem) == ([LOAD["name"]], None)


@pytest.mark.parametrize("encoding", ["otlp_json", "otlp_proto"])
def test_long_name_with_many_points_does_not_fill_the_memory(encoding):
    metric = {"name": "n" * 50_000, "gauge": {"dataPoints": [{}] * 1000}}
    raw = json.dumps({"resourceMetrics": [resource([metric], **HOST)]}).encode()
    if encoding == "otlp_proto":
        raw = json_format.Parse(raw, ExportMetricsServiceRequest()).SerializeToString()
    reader = OtlpReader(encoding)
    tracemalloc.start()
    try:
        _, problem = reader.decode(raw)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert "exceeds 127" in problem
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("encoding", "raw", "reason"),
    [
        ("otlp_json", None, "tombstone"),
        ("otlp_proto", None, "tombstone"),
        ("otlp_json", b"", "not metrics in OTLP's JSON"),
        ("otlp_json", b'{"resourceSpans":[]}', "resourceMetrics"),
        ("otlp_json", b'{"resourceMetrics":[{"resource":{"attributes":' + b"[" * 5000, "OTLP's JSON"),
        ("otlp_json", b"\x0a\x03\xff\xff\xff", "OTLP's JSON"),
        ("otlp_proto", b'{"resourceMetrics":[]}', "not metrics in OTLP's Protobuf"),
        ("otlp_proto", b"\x0a\xff", "not metrics in OTLP's Protobuf"),
    ],
)
def test_what_holds_no_metrics_is_a_dead_letter(encoding, raw, reason):
    with pytest.raises(DecodeError, match=reason):
        OtlpReader(encoding).decode(raw)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValidationError, match="exclude each other"):
        OtlpConfig(include=["a"], exclude=["b"])
