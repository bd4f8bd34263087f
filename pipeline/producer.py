"""MetadataProducer: how an agent, or a program that acts for agents, reports metadata."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, Final, Self

import structlog
from confluent_kafka import KafkaError, KafkaException, Message, Producer
from prometheus_client import CollectorRegistry

from pipeline.core.report import Entry, Report, apply_limits, identify, key_problem
from pipeline.errors import DecodeError, PipelineError
from pipeline.formats.encoder import ReportFormat, report_encoder
from pipeline.kafka.errors import log_unavailable
from pipeline.kafka.publisher import PARTITIONER
from pipeline.monitoring.consumer_metrics import PREFIX
from pipeline.monitoring.metrics import ProducerMetrics

# A full queue is logged at most this often. Source: metadatabatcher.
DROP_WARNING_SECONDS: Final = 10.0
_LINGER_MS: Final = 20

_log = structlog.get_logger(__name__)


class MetadataProducer:
    """Produces agents' reports to the events topic; make one per process, usable from several threads.

        with MetadataProducer({"bootstrap.servers": "localhost:9092"}) as producer:
            producer.add(uuid.UUID("0b7c1e1c-3a54-4be5-9f0e-2a8f7b1ac001"), ["cpu", "mem"], ["12%", "3 GB"], ["", ""])

    `add` queues a report and returns at once; a thread of librdkafka's sends it. Leaving the block waits up to 15 s for
    Kafka to acknowledge all reports; `flush` waits earlier.

    Guarantee: a report that Kafka acknowledged (acks=all, idempotent) is not lost; one report stays one record, and an
    agent's records stay in order. Reports that are not acknowledged are counted and logged.
    """

    def __init__(
        self,
        client_config: Mapping[str, Any],
        *,
        topic: str = "agent-metadata.events.v1",
        registry: CollectorRegistry | None = None,
        metrics_prefix: str = PREFIX,
        logger: Any = None,
        max_queued_reports: int = 100_000,
        format: ReportFormat = "json",  # noqa: A002  # the best name there is
        schema_registry: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a producer; it connects to Kafka by itself, and reconnects after an outage.

        Args:
            client_config: librdkafka's configuration, as confluent_kafka.Producer takes it: `bootstrap.servers`, and
                `security.protocol`, `sasl.*` and `ssl.*` where the cluster needs them.
            topic: the events topic; `agent-metadata topics create` creates it.
            registry: where to register the metrics; by default they are not exported.
            metrics_prefix: prefix of the metric `dropped_keys`; metrics.CODER_PREFIX gives it coder's own name.
            logger: a structlog logger; by default this module's.
            max_queued_reports: how many reports may wait in memory, beyond which `add` drops new ones.
            format: json needs no registry; json_schema, avro and protobuf are in Confluent's wire format. Their schema
                is registered now, under the subject `<topic>-value`, and the registry is not needed afterwards.
            schema_registry: confluent-kafka's configuration of a registry's client: `url`, `basic.auth.user.info`,
                `bearer.auth.token`, `ssl.*`; with `auto.register.schemas` False the schema must be registered already.

        Raises:
            ConfigError: `format` can't be written: it lacks a registry, the registry refuses us or our schema, or the
                extra [formats] is not installed.
            ServiceUnavailable: the registry does not answer within 10 s.
        """
        self._encode = report_encoder(format, topic=topic, schema_registry=schema_registry)
        self._topic = topic
        self._metrics = ProducerMetrics(registry or CollectorRegistry(), metrics_prefix)
        self._log = logger or _log
        self._warned_at = -DROP_WARNING_SECONDS
        self._dropped_since_warning = 0
        self._is_closed = False
        self._failed = 0
        self._producer = Producer(
            {
                **client_config,
                "acks": "all",
                "enable.idempotence": True,
                "compression.type": "lz4",
                "linger.ms": _LINGER_MS,
                "partitioner": PARTITIONER,
                "queue.buffering.max.messages": max_queued_reports,
                "error_cb": partial(log_unavailable, log=self._log),
            }
        )

    def add(
        self,
        agent_id: uuid.UUID | str,
        keys: Sequence[str],
        values: Sequence[str],
        errors: Sequence[str],
        collected_at: datetime | Sequence[datetime] | None = None,
    ) -> bool:
        """Queue one report; never blocks. Return False if the local queue was full and the report was dropped.

        `agent_id` is a UUID, or any other text of at most 255 characters, which is the agent's name then.

        Shape: `keys`, `values` and `errors` have the same length, an error being "" where there is none; without keys
        there is no report. `collected_at` is an aware time for all keys, one per key, or None for the time at which the
        report reaches Kafka.

        Raises:
            ValueError: lengths differ, a time is naive, a key or name is too long, or the report is too large for a
                record (nothing is queued); or the keys together exceed 6,144 bytes: the keys before that are queued, as
                in coder's agent API.
            RuntimeError: the producer is closed.
            PipelineError: Kafka refuses reports for this topic from this user; or, for good, from this producer.
        """
        if self._is_closed:
            raise RuntimeError("the producer is closed: this report would be lost")
        report = _report(agent_id, keys, values, errors, collected_at)
        if not report.entries:
            return True
        problem = apply_limits(report)
        is_queued = self._produce(report)
        if problem is not None:
            raise ValueError(problem)
        return is_queued

    def flush(self, timeout_seconds: float = 30.0) -> int:
        """Wait until Kafka has acknowledged all reports, or time is up; return how many are still unacknowledged."""
        with contextlib.suppress(KafkaException):  # of a producer that is refused for good, as add() reports
            self._producer.flush(timeout_seconds)
        return len(self._producer)

    def close(self, timeout_seconds: float = 15.0) -> int:
        """Flush and accept no more reports; return how many of all queued reports Kafka did not acknowledge."""
        self._is_closed = True
        return self.flush(timeout_seconds) + self._failed

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if left := self.close() - self._failed:  # each refusal was logged
            self._log.warning("reports_not_acknowledged", count=left, advice="is Kafka up?")

    def _produce(self, report: Report) -> bool:
        value = self._encode(report)
        try:
            self._producer.poll(0)
            self._producer.produce(self._topic, value, report.agent_id.encode(), on_delivery=self._delivered)
        except BufferError:
            self._count_dropped(len(report.entries))
            return False
        except KafkaException as error:
            reason = error.args[0]
            if reason.code() != KafkaError.MSG_SIZE_TOO_LARGE:
                raise PipelineError(
                    f"Kafka refuses reports for {self._topic}: {reason.str()}; may this user WRITE to it?"
                ) from error
            raise ValueError(
                f"report of {len(value)} bytes is too large for a record: send fewer keys at once"
            ) from None
        return True

    def _count_dropped(self, entries: int) -> None:
        self._metrics.dropped_keys.inc(entries)
        self._dropped_since_warning += entries
        now = time.monotonic()
        if now - self._warned_at >= DROP_WARNING_SECONDS:
            self._log.warning("local_queue_full", dropped_keys=self._dropped_since_warning, advice="is Kafka up?")
            self._warned_at, self._dropped_since_warning = now, 0

    def _delivered(self, error: KafkaError | None, _message: Message) -> None:
        if error is not None:
            self._failed += 1
            self._metrics.failed_deliveries.inc()
            self._log.warning("report_not_delivered", topic=self._topic, error=error.str())


def _report(
    agent_id: uuid.UUID | str,
    keys: Sequence[str],
    values: Sequence[str],
    errors: Sequence[str],
    collected_at: datetime | Sequence[datetime] | None,
) -> Report:
    times = collected_at if isinstance(collected_at, Sequence) else [collected_at] * len(keys)
    if not len(keys) == len(values) == len(errors) == len(times):
        raise ValueError(
            f"keys ({len(keys)}), values ({len(values)}), errors ({len(errors)}) and collected_at ({len(times)}) "
            "must have the same length"
        )
    for key in keys:
        if (problem := key_problem(key)) is not None:
            raise ValueError(problem)
    times = [None if moment is None else _to_utc(moment) for moment in times]
    shared = times[0] if isinstance(collected_at, datetime) and times else None
    entries = [
        Entry(key, value, error, None if shared is not None else moment)
        for key, value, error, moment in zip(keys, values, errors, times, strict=True)
    ]
    return Report(_agent(agent_id), entries, shared)


def _agent(agent_id: uuid.UUID | str) -> str:
    """Return what the report and its record key call the agent, always the same: its name, or the canonical UUID."""
    try:
        canonical, name = identify(str(agent_id))
    except DecodeError as error:
        raise ValueError(str(error)) from None
    return name or canonical


def _to_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError(f"collected_at {moment.isoformat()} has no time zone")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"collected_at {moment.isoformat()} is outside the years 1 to 9999 in UTC") from None
