"""MetadataProducer: how an agent, or what speaks for agents, reports its metadata."""

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

from pipeline.core.report import Entry, Report, apply_limits, encode_report, key_problem
from pipeline.errors import PipelineError
from pipeline.monitoring.metrics import PREFIX, ProducerMetrics

# Source: metadatabatcher warns of dropped entries at most this often.
DROP_WARNING_SECONDS: Final = 10.0
_LINGER_MS: Final = 20

_log = structlog.get_logger(__name__)


class MetadataProducer:
    """Produces reports to the events topic; made for one process, usable from several threads.

    Guarantee: an accepted report that Kafka acknowledged (acks=all, idempotent) is not lost; one report stays one
    record, and an agent's records stay in order. What is not acknowledged is counted and logged.
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
    ) -> None:
        """Make a producer.

        `registry` takes its metrics, `metrics_prefix` is that of `dropped_keys` (metrics.CODER_PREFIX for coder's own
        name); `logger` is a structlog logger, by default this module's.
        """
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
                # Java's default for keyed records, so that an agent's records from any client share a partition.
                "partitioner": "murmur2",
                "queue.buffering.max.messages": max_queued_reports,
                "error_cb": partial(_log_error, self._log),
            }
        )

    def add(
        self,
        agent_id: uuid.UUID,
        keys: Sequence[str],
        values: Sequence[str],
        errors: Sequence[str],
        collected_at: datetime | Sequence[datetime] | None = None,
    ) -> bool:
        """Queue one report; never blocks. Return False if the local queue was full and the report was dropped.

        Shape: equally long sequences; no keys make no report. `collected_at` is one aware time for all keys, one a
        key, or None: then the broker's time of arrival counts.

        Raises:
            ValueError: lengths differ, a time is naive, a key is too long, the report is too large for a record
                (nothing is queued), or the keys together exceed 6,144 bytes: what came before that key is queued,
                as coder's agent API does.
            RuntimeError: the producer is closed.
            PipelineError: Kafka takes no reports for this topic from this user; or, for good, from this producer.
        """
        if self._is_closed:
            raise RuntimeError("the producer is closed: this report would be lost")
        report = _report(agent_id, keys, values, errors, collected_at)
        if not report.entries:
            return True
        left_out = apply_limits(report)
        is_queued = self._produce(report)
        if left_out is not None:
            raise ValueError(left_out)
        return is_queued

    def flush(self, timeout_seconds: float = 30.0) -> int:
        """Wait for acknowledgements; return how many reports still wait for one."""
        with contextlib.suppress(KafkaException):  # of a producer that is refused for good, as add() says
            self._producer.flush(timeout_seconds)
        return len(self._producer)

    def close(self, timeout_seconds: float = 15.0) -> int:
        """Flush and take no more reports; return how many of all that were queued Kafka did not acknowledge."""
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
        value = encode_report(report)
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
                    f"Kafka takes no reports for {self._topic}: {reason.str()}; may this user WRITE to it?"
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
    agent_id: uuid.UUID,
    keys: Sequence[str],
    values: Sequence[str],
    errors: Sequence[str],
    collected_at: datetime | Sequence[datetime] | None,
) -> Report:
    times = collected_at if isinstance(collected_at, Sequence) else [collected_at] * len(keys)
    if not len(keys) == len(values) == len(errors) == len(times):
        raise ValueError(
            f"keys ({len(keys)}), values ({len(values)}), errors ({len(errors)}) and collected_at ({len(times)}) "
            "must be equally long"
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
    return Report(str(agent_id), entries, shared)


def _to_utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise ValueError(f"collected_at {moment.isoformat()} has no time zone")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ValueError(f"collected_at {moment.isoformat()} is outside the years 1 to 9999 in UTC") from None


def _log_error(log: Any, error: KafkaError) -> None:
    log.warning("kafka_unavailable", error=error.str())
