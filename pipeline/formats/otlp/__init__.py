"""Reports out of metrics that an OpenTelemetry Collector's kafka exporter writes."""

from pipeline.formats.otlp.config import OtlpConfig
from pipeline.formats.otlp.metrics import OtlpReader

__all__ = ["OtlpConfig", "OtlpReader"]
