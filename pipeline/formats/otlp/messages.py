"""OTLP's metrics as bytes: Protobuf by OpenTelemetry's own package, and JSON into structs of the same shape.

Source: opentelemetry-proto, metrics/v1/metrics.proto and common/v1/common.proto; the JSON is Protobuf's, with names in
lowerCamelCase and 64-bit integers as text. Of a record, only what becomes text is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from pipeline.core.report import PARSE_ERRORS, parse_problem
from pipeline.errors import ConfigError, DecodeError

NO_RECORDED_VALUE: Final = 1  # a bit of a point's flags


class _Message(msgspec.Struct, rename="camel", gc=False):
    """A message; as Protobuf's own, it says which of its optional fields are there."""

    def HasField(self, name: str) -> bool:  # noqa: N802  # Protobuf's name
        return getattr(self, name) is not None


class _OneOf(_Message):
    def WhichOneof(self, _group: str) -> str | None:  # noqa: N802  # Protobuf's name
        fields = type(self).ONE_OF  # type: ignore[attr-defined]
        return next((name for name in fields if getattr(self, name) is not None), None)


class _AnyValue(_OneOf):
    ONE_OF = ("string_value", "bool_value", "int_value", "double_value", "array_value", "kvlist_value", "bytes_value")

    string_value: str | None = None
    bool_value: bool | None = None
    int_value: int | None = None
    double_value: float | None = None
    array_value: _Array | None = None
    kvlist_value: _KeyValueList | None = None
    bytes_value: bytes | None = None


class _Array(_Message):
    values: list[_AnyValue] = []


class _KeyValue(_Message):
    key: str = ""
    value: _AnyValue = msgspec.field(default_factory=_AnyValue)


class _KeyValueList(_Message):
    values: list[_KeyValue] = []


class _Point(_OneOf):
    """A point of any kind of metric."""

    ONE_OF = ("as_double", "as_int")

    attributes: list[_KeyValue] = []
    time_unix_nano: int = 0
    flags: int = 0
    as_double: float | None = None
    as_int: int | None = None
    count: int = 0
    sum: float | None = None
    min: float | None = None
    max: float | None = None
    quantile_values: list[_Quantile] = []


class _Quantile(_Message):
    quantile: float = 0.0
    value: float = 0.0


class _Points(_Message):
    data_points: list[_Point] = []


class _Metric(_OneOf):
    ONE_OF = ("gauge", "sum", "histogram", "exponential_histogram", "summary")

    name: str = ""
    gauge: _Points | None = None
    sum: _Points | None = None
    histogram: _Points | None = None
    exponential_histogram: _Points | None = None
    summary: _Points | None = None


class _ScopeMetrics(_Message):
    metrics: list[_Metric] = []


class _Resource(_Message):
    attributes: list[_KeyValue] = []


class _ResourceMetrics(_Message):
    resource: _Resource = msgspec.field(default_factory=_Resource)
    scope_metrics: list[_ScopeMetrics] = []


class _MetricsData(_Message):
    resource_metrics: list[_ResourceMetrics]


def json_reader() -> Callable[[bytes], Any]:
    """Return what decodes `otlp_json`, raising DecodeError."""
    decode = msgspec.json.Decoder(_MetricsData, strict=False).decode

    def read(raw: bytes) -> Any:
        try:
            return decode(raw)
        except PARSE_ERRORS as error:
            raise DecodeError(f"not metrics in OTLP's JSON: {parse_problem(error)}") from None

    return read


def proto_reader() -> Callable[[bytes], Any]:
    """Return what decodes `otlp_proto`, raising DecodeError.

    Raises:
        ConfigError: OpenTelemetry's package is not installed.
    """
    try:
        from google.protobuf.message import DecodeError as NotProtobuf
        from opentelemetry.proto.metrics.v1.metrics_pb2 import MetricsData
    except ImportError:
        raise ConfigError(
            "AGENT_METADATA_EVENTS_FORMAT=otlp_proto needs packages: pip install 'agent-metadata-pipeline[formats]'"
        ) from None

    def read(raw: bytes) -> Any:
        try:
            # An ExportMetricsServiceRequest has the same fields.
            return MetricsData.FromString(raw)
        except NotProtobuf as error:
            raise DecodeError(f"not metrics in OTLP's Protobuf: {error}") from None

    return read
