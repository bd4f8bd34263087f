"""The worker's process: a Worker, what watches it, and how it stops."""

from __future__ import annotations

import asyncio
from typing import Final

import structlog
from prometheus_client import CollectorRegistry

from pipeline.clock import SystemClock
from pipeline.kafka.admin import KafkaAdmin
from pipeline.kafka.dead_letters import DeadLetterWriter
from pipeline.kafka.publisher import Publisher
from pipeline.kafka.topics import Incarnation
from pipeline.monitoring.health import Heartbeat, exit_when_stuck, serve_health
from pipeline.monitoring.metrics import WorkerMetrics
from pipeline.roles.process import on_stop_signals, tune_garbage_collector
from pipeline.roles.role import LAST_FLUSH_SECONDS, find_topics, watch_lag
from pipeline.settings import Settings
from pipeline.worker import Worker

# Kafka acknowledges a window within milliseconds, and large ones within a second or two.
UNACKNOWLEDGED_SECONDS: Final = 10.0

_log = structlog.get_logger(__name__)


async def run_worker(settings: Settings) -> None:
    """Run a worker until SIGTERM or SIGINT.

    Raises:
        ConfigError, TopicMismatch, ServiceUnavailable: it could not start.
        PipelineError: it failed; nothing unsafe was committed.
    """
    topics = await find_topics(settings)
    events = topics["events"]
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, settings.events_topic)
    publisher = Publisher(settings.client_config())
    admin = KafkaAdmin(settings.client_config())
    worker = Worker(
        settings,
        publisher=publisher,
        dead_letters=DeadLetterWriter(
            publisher, settings.dead_letter_topic, stage="worker", source_topic=settings.events_topic
        ),
        incarnation=Incarnation.of(events, admin),
        partitions=events.partitions,
        clock=SystemClock(),
        metrics=metrics,
    )
    metrics.unacknowledged_seconds.set_function(worker.unacknowledged_seconds)
    metrics.consumer.outage_seconds.labels("schema_registry").set_function(worker.schema_wait_seconds)
    lag = watch_lag(settings, admin, events, worker.positions, lambda: worker.is_held, metrics.consumer)
    heartbeat = Heartbeat(settings.stuck_seconds)

    def why_not_live() -> str | None:
        return heartbeat.why_stuck() or lag.why_stuck()

    serve_health(
        settings.metrics_port,
        registry,
        why_not_live=why_not_live,
        why_not_ready=lambda: lag.why_unavailable() or _why_not_ready(worker),
    )
    exit_when_stuck(why_not_live)
    watching = asyncio.create_task(lag.run())
    on_stop_signals(worker.stop)
    tune_garbage_collector()
    _log.info("worker_started", group=settings.worker_group, topic=settings.events_topic)
    try:
        await worker.run()
    finally:
        watching.cancel()
        if left := await publisher.close(LAST_FLUSH_SECONDS):
            _log.warning("batches_not_acknowledged", count=left, advice="they will be made again from the events")
    _log.info("worker_stopped")


def _why_not_ready(worker: Worker) -> str | None:
    if not worker.is_assigned:
        return "no partitions are assigned"
    if (seconds := worker.schema_wait_seconds()) > UNACKNOWLEDGED_SECONDS:
        return f"the schema registry has not returned a schema for {seconds:.0f} s"
    seconds = worker.unacknowledged_seconds()
    return f"Kafka has not acknowledged a window for {seconds:.0f} s" if seconds > UNACKNOWLEDGED_SECONDS else None
