"""The sink's process: a Sink, its store, what watches both, and how it stops."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Final

import structlog
from prometheus_client import CollectorRegistry

from pipeline.errors import PipelineError
from pipeline.kafka.admin import KafkaAdmin
from pipeline.kafka.dead_letters import DeadLetterWriter
from pipeline.kafka.publisher import Publisher
from pipeline.kafka.topics import Incarnation
from pipeline.monitoring.health import Heartbeat, Outage, exit_when_stuck, serve_health
from pipeline.monitoring.lag import LagWatch
from pipeline.monitoring.metrics import SinkMetrics
from pipeline.postgres.connections import connected
from pipeline.postgres.migrations import require_defaults, require_schema
from pipeline.postgres.store import Store
from pipeline.replay.refill import refill
from pipeline.roles.process import on_stop_signals, tune_garbage_collector
from pipeline.roles.role import LAST_FLUSH_SECONDS, find_topics, watch_lag
from pipeline.settings import SHUTDOWN_SECONDS, Settings
from pipeline.sink import BatchConsumer, BatchesTopic, Sink, TableWatch

# Two concurrent transactions write the most rows a second: measured on two cores, a third adds nothing.
SINK_CONNECTIONS: Final = 2
# How often the sink checks that Postgres answers, so that an idle sink notices an outage too.
_PING_SECONDS: Final = 2.0

_log = structlog.get_logger(__name__)


async def run_sink(settings: Settings) -> None:
    """Run a sink until SIGTERM or SIGINT; then apply what Kafka holds at that moment, for at most 15 s.

    Raises:
        ConfigError, TopicMismatch, SchemaMismatch, ServiceUnavailable: it could not start.
        PipelineError: it failed; what it had not applied stays in Kafka.
    """
    batches = (await find_topics(settings))["batches"]
    store = await _open_store(settings)
    publisher = Publisher(settings.client_config())
    registry = CollectorRegistry()
    metrics = SinkMetrics(registry, settings.metrics_prefix, settings.batches_topic)
    admin = KafkaAdmin(settings.client_config())
    topic = BatchesTopic(settings, batches, store, Incarnation.of(batches, admin))
    consumer = BatchConsumer(
        settings.client_config(),
        topic=batches.name,
        group=settings.sink_group,
        session_timeout_seconds=settings.session_timeout_seconds,
        locate=topic.locate,
    )
    failures: list[BaseException] = []
    stop = asyncio.Event()

    def fail(error: BaseException) -> None:
        failures.append(error)
        stop.set()

    def fail_with(task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            fail(task.exception() or AssertionError(f"{task.get_name()} has ended"))

    dead_letters = DeadLetterWriter(publisher, settings.dead_letter_topic, stage="sink", source_topic=batches.name)
    sink = Sink(consumer=consumer, topic=topic, dead_letters=dead_letters, metrics=metrics, on_failure=fail)
    lag = watch_lag(settings, admin, batches, sink.positions, lambda: consumer.is_held, metrics.consumer)
    table = TableWatch(store.epoch.is_emptied, partial(_refill, settings))
    postgres = Outage("Postgres")
    metrics.consumer.outage_seconds.labels("postgres").set_function(lambda: max(sink.held_seconds, postgres.seconds()))
    heartbeat = Heartbeat(settings.stuck_seconds)

    def why_not_live() -> str | None:
        stuck = heartbeat.why_stuck() or consumer.why_stuck(settings.stuck_seconds) or lag.why_stuck()
        return stuck or _why_out_of_group(consumer, lag, settings.stuck_seconds)

    serve_health(
        settings.metrics_port,
        registry,
        why_not_live=why_not_live,
        why_not_ready=lambda: (
            lag.why_unavailable() or _why_not_ready(consumer, sink, table) or postgres.why_unavailable()
        ),
    )
    exit_when_stuck(why_not_live)
    watching = [
        asyncio.create_task(lag.run(), name="the lag watch"),
        asyncio.create_task(table.run(), name="the table watch"),
        asyncio.create_task(_ping(store, postgres), name="the ping"),
    ]
    for task in watching:
        task.add_done_callback(fail_with)
    on_stop_signals(stop.set)
    tune_garbage_collector()
    consuming = sink.start()
    _log.info("sink_started", group=settings.sink_group, topic=settings.batches_topic)
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([consuming, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not failures and not consuming.done():
            await sink.drain(SHUTDOWN_SECONDS)
    finally:
        waiting.cancel()
        for task in watching:
            task.cancel()
        await consumer.close()
        await asyncio.wait(watching)  # a refill under way releases its lock
        sink.lose(range(batches.partitions))
        await publisher.close(LAST_FLUSH_SECONDS)
        await store.close()
    if consuming.done() and (error := consuming.exception()) is not None:
        failures.append(error)
    if failures:
        raise failures[0]
    _log.info("sink_stopped")


def _why_out_of_group(consumer: BatchConsumer, lag: LagWatch, stuck_seconds: float) -> str | None:
    seconds = min(consumer.seconds_out_of_group(), lag.seconds_answering())
    return f"out of its consumer group for {seconds:.0f} s although Kafka answers" if seconds > stuck_seconds else None


def _why_not_ready(consumer: BatchConsumer, sink: Sink, table: TableWatch) -> str | None:
    if table.is_emptied:
        return "the table was emptied, and is being refilled"
    if not consumer.is_assigned:
        return "no partitions are assigned, or Postgres has not said where to start"
    return "Postgres can't take batches; they are held back" if sink.is_holding else sink.why_upgrade


async def _refill(settings: Settings) -> bool:
    summary = await refill(settings)
    if summary is None:
        return False
    _log.info(
        "table_refilled",
        rows=summary.changed,
        pairs=summary.pairs,
        records=summary.records,
        refused=summary.refused,
    )
    return True


async def _ping(store: Store, outage: Outage) -> None:
    while True:
        try:
            await store.ping()
        except PipelineError:
            outage.note(answers=False)
        else:
            outage.note(answers=True)
        await asyncio.sleep(_PING_SECONDS)


async def _open_store(settings: Settings) -> Store:
    async with connected(settings.database_url.get_secret_value()) as connection:
        await require_schema(connection)
        if settings.undeclared == "insert":
            await require_defaults(connection)
    return await Store.connect(
        settings.database_url.get_secret_value(),
        connections=SINK_CONNECTIONS,
        undeclared=settings.undeclared,
        notify=settings.notify == "on",
    )
