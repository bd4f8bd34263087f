"""Reports as a producer writes them: our own JSON, or in Confluent's wire format with our schema registered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple, get_args

from pipeline.core.report import Report, encode_report
from pipeline.data_files import data_dir
from pipeline.errors import ConfigError
from pipeline.formats.framing import frame
from pipeline.formats.registry import SchemaKind, SchemaRegistry
from pipeline.formats.reports import write_avro_report, write_protobuf_report

ReportFormat = Literal["json", "json_schema", "avro", "protobuf"]


class _Framed(NamedTuple):
    kind: SchemaKind
    schema: str
    write: Callable[[Report], bytes]
    indexes: bytes = b""


_FRAMED: Final = {
    "json_schema": _Framed("JSON", "report.schema.json", encode_report),
    "avro": _Framed("AVRO", "report.avsc", write_avro_report),
    # The message indexes: the first message of the schema.
    "protobuf": _Framed("PROTOBUF", "report.proto", write_protobuf_report, b"\0"),
}


def report_encoder(
    report_format: ReportFormat, *, topic: str, schema_registry: Mapping[str, Any] | None
) -> Callable[[Report], bytes]:
    """Return what encodes reports for a topic; register their schema under the subject `<topic>-value` first.

    Raises:
        ConfigError: there is no such format, no registry is given, or it refuses our schema or this client.
        ServiceUnavailable: the registry does not answer.
    """
    if report_format == "json":
        return encode_report
    if report_format not in _FRAMED:
        raise ConfigError(f"{report_format!r} is not a format of reports: use {', '.join(get_args(ReportFormat))}")
    if not schema_registry:
        raise ConfigError(
            f"reports in the format {report_format} need a schema registry: set AGENT_METADATA_SCHEMA_REGISTRY_URL, or "
            'give MetadataProducer schema_registry={"url": ...}'
        )
    kind, schema, write, indexes = _FRAMED[report_format]
    text = (data_dir("topics") / schema).read_text(encoding="utf-8")
    with SchemaRegistry(schema_registry) as registry:
        prefix = frame(registry.register(f"{topic}-value", kind, text), indexes)
    return lambda report: prefix + write(report)
