"""Wire a worker and a sink from settings: what runs in one process each."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import structlog
from confluent_kafka import Message
from prometheus_client import CollectorRegistry

from pipeline.clock import SystemClock
from pipeline.core.batch import Row
from pipeline.core.dead_letter import dead_letter_headers
from pipeline.core.report import Entry, Report, encode_report
from pipeline.core.window import Rejected
from pipeline.errors import PipelineError, RowRejected, ServiceUnavailable, TopicMismatch
from pipeline.kafka.admin import KafkaAdmin
from pipeline.kafka.incarnation import Incarnation
from pipeline.kafka.publisher import Publisher
from pipeline.kafka.topics import TopicFacts, require_topics
from pipeline.monitoring.health import Heartbeat, Outage, exit_when_stuck, serve_health
from pipeline.monitoring.lag import ANSWER_SECONDS, LagWatch, Position
from pipeline.monitoring.metrics import ConsumerMetrics, SinkMetrics, WorkerMetrics
from pipeline.postgres.connections import connected
from pipeline.postgres.migrations import require_defaults, require_schema
from pipeline.postgres.store import PartitionId, Received, Store
from pipeline.replay.refill import refill
from pipeline.roles.process import on_stop_signals, tune_garbage_collector
from pipeline.settings import SHUTDOWN_SECONDS, Settings
from pipeline.sink import Sink
from pipeline.sink.consumer import BatchConsumer
from pipeline.sink.table_watch import TableWatch
from pipeline.worker import Worker

# How long a start waits for Kafka or Postgres before it says that they can't be reached.
START_TIMEOUT_SECONDS: Final = 8.0
# As many transactions at once as bring more rows a second: measured on two cores, one more brings nothing.
SINK_CONNECTIONS: Final = 2
# What matters was waited for before; this is for dead letters under way.
_LAST_FLUSH_SECONDS: Final = 1.0
# Kafka acknowledges a window within milliseconds, and large ones within a second or two.
UNACKNOWLEDGED_SECONDS: Final = 10.0
# How often the sink asks Postgres whether it is there, so that an idle one knows too.
_PING_SECONDS: Final = 2.0

_log = structlog.get_logger(__name__)


async def run_worker(settings: Settings) -> None:
    """Run a worker until SIGTERM or SIGINT.

    Raises:
        ConfigError, ServiceUnavailable: it could not start.
        PipelineError: it failed; nothing unsafe was committed.
    """
    topics = await require_topics(settings.client_config(), settings.declared_topics(), timeout_s=START_TIMEOUT_SECONDS)
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry, settings.events_topic)
    publisher = Publisher(settings.client_config())
    admin = KafkaAdmin(settings.client_config())

    async def dead_letter(rejected: Rejected, partition: int) -> asyncio.Future[None]:
        record = rejected.record
        headers = dead_letter_headers(
            topic=settings.events_topic,
            partition=partition,
            offset=record.offset,
            timestamp_ms=record.timestamp,
            stage="worker",
            error_class="DecodeError",
            message=rejected.reason,
            original=tuple(getattr(record, "headers", ())),
        )
        return await publisher.send(settings.dead_letter_topic, record.value, key=record.key, headers=headers)

    worker = Worker(
        settings,
        send=publisher.send,
        dead_letter=dead_letter,
        events_topic_id=_incarnation(admin, topics["events"]).topic_id,
        partitions=topics["events"].partitions,
        clock=SystemClock(),
        metrics=metrics,
    )
    metrics.unacknowledged_seconds.set_function(worker.unacknowledged_seconds)
    watch = _watch_lag(settings, admin, topics["events"], worker.positions, lambda: worker.is_held, metrics.consumer)
    heartbeat = Heartbeat(settings.stuck_seconds)

    def why_not_live() -> str | None:
        return heartbeat.why_stuck() or watch.why_stuck()

    serve_health(
        settings.metrics_port,
        registry,
        why_not_live=why_not_live,
        why_not_ready=lambda: watch.why_away() or _why_worker_not_ready(worker),
    )
    exit_when_stuck(why_not_live)
    watching = asyncio.create_task(watch.run())
    on_stop_signals(worker.stop)
    tune_garbage_collector()
    _log.info("worker_started", group=settings.worker_group, topic=settings.events_topic)
    try:
        await worker.run()
    finally:
        watching.cancel()
        if left := await publisher.close(_LAST_FLUSH_SECONDS):
            _log.warning("batches_not_acknowledged", count=left, advice="they will be made again from the events")
    _log.info("worker_stopped")


def _why_worker_not_ready(worker: Worker) -> str | None:
    if not worker.is_assigned:
        return "no partitions are assigned"
    seconds = worker.unacknowledged_seconds()
    return f"Kafka has not acknowledged a window for {seconds:.0f} s" if seconds > UNACKNOWLEDGED_SECONDS else None


async def run_sink(settings: Settings) -> None:
    """Run a sink until SIGTERM or SIGINT; then apply what Kafka holds at that moment, for at most 15 s.

    Raises:
        ConfigError, ServiceUnavailable: it could not start.
        PipelineError: it failed; what it had not applied stays in Kafka.
    """
    topics = await require_topics(settings.client_config(), settings.declared_topics(), timeout_s=START_TIMEOUT_SECONDS)
    store = await _open_store(settings)
    stop = asyncio.Event()
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        stop.set()

    publisher = Publisher(settings.client_config())
    registry = CollectorRegistry()
    batches = topics["batches"]
    metrics = SinkMetrics(registry, settings.metrics_prefix, settings.batches_topic)
    admin = KafkaAdmin(settings.client_config())
    consumer, sink = wire_sink(settings, admin, batches, store, publisher, metrics, fail)
    lag = _watch_lag(settings, admin, batches, sink.positions, lambda: consumer.is_held, metrics.consumer)
    table = TableWatch(store.is_emptied, lambda: refill(settings))
    postgres = Outage("Postgres")
    metrics.consumer.outage_seconds.labels("postgres").set_function(lambda: max(sink.held_seconds, postgres.seconds()))
    heartbeat = Heartbeat(settings.stuck_seconds)

    def why_out_of_group() -> str | None:
        seconds = min(consumer.seconds_out_of_group(), lag.seconds_answering())
        is_stuck = seconds > settings.stuck_seconds
        return f"out of its consumer group for {seconds:.0f} s although Kafka answers" if is_stuck else None

    def why_not_live() -> str | None:
        stuck = heartbeat.why_stuck() or consumer.why_stuck(settings.stuck_seconds) or lag.why_stuck()
        return stuck or why_out_of_group()

    serve_health(
        settings.metrics_port,
        registry,
        why_not_live=why_not_live,
        why_not_ready=lambda: lag.why_away() or _why_sink_not_ready(consumer, sink, table) or postgres.why_away(),
    )
    exit_when_stuck(why_not_live)
    watching = [asyncio.create_task(job) for job in (lag.run(), table.run(), _ping(store, postgres))]
    for job in watching:
        job.add_done_callback(lambda task: None if task.cancelled() else fail(task.exception() or AssertionError()))
    on_stop_signals(stop.set)
    tune_garbage_collector()
    consuming = consumer.start()
    _log.info("sink_started", group=settings.sink_group, topic=settings.batches_topic)
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([consuming, waiting], return_when=asyncio.FIRST_COMPLETED)
        if not failures and not consuming.done():
            try:
                await sink.drain(await consumer.ends(), SHUTDOWN_SECONDS)
            except ServiceUnavailable as away:
                _log.warning("batches_left_unapplied", why=str(away), advice="they wait in Kafka for the next start")
    finally:
        for task in (waiting, *watching):
            task.cancel()
        await consumer.close()
        await asyncio.wait(watching)  # a refill under way lets go of its lock
        sink.lose(range(batches.partitions))
        await publisher.close(_LAST_FLUSH_SECONDS)
        await store.close()
    if consuming.done() and (error := consuming.exception()) is not None:
        failures.append(error)
    if failures:
        raise failures[0]
    _log.info("sink_stopped")


def _why_sink_not_ready(consumer: BatchConsumer, sink: Sink, table: TableWatch) -> str | None:
    if table.is_emptied:
        return "the table was emptied, and is being refilled"
    if not consumer.is_assigned:
        return "no partitions are assigned, or Postgres has not said where to begin"
    return "Postgres is away; batches are held back" if sink.is_holding else None


def _watch_lag(
    settings: Settings,
    admin: KafkaAdmin,  # not the consumer: what is stuck in it must not keep the offsets from being asked for
    topic: TopicFacts,
    positions: Callable[[], Mapping[int, Position]],
    is_held: Callable[[], bool],
    metrics: ConsumerMetrics,
) -> LagWatch:
    async def offsets(partitions: Sequence[int]) -> dict[int, tuple[int, int]]:
        # A second less than the watch waits, so that it is the admin client that gives up, and begins anew.
        return await admin.offsets(topic.name, partitions, ANSWER_SECONDS - 1)

    watch = LagWatch(
        positions=positions,
        offsets=offsets,
        is_held=is_held,
        show=metrics.show_lags,
        clock=SystemClock(),
        stuck_seconds=settings.stuck_seconds,
    )
    metrics.outage_seconds.labels("kafka").set_function(watch.seconds_away)
    return watch


def _incarnation(admin: KafkaAdmin, topic: TopicFacts) -> Incarnation:
    async def remembered() -> str:
        return topic.topic_id  # the embedded broker can't be asked, and deletes nothing

    return Incarnation(
        topic.name,
        remembered if topic.is_embedded else lambda: admin.topic_id(topic.name, START_TIMEOUT_SECONDS),
    )


async def _ping(store: Store, outage: Outage) -> None:
    while True:
        try:
            await store.ping()
        except PipelineError:
            outage.note(answers=False)
        else:
            outage.note(answers=True)
        await asyncio.sleep(_PING_SECONDS)


def wire_sink(
    settings: Settings,
    admin: KafkaAdmin,
    batches: TopicFacts,
    store: Store,
    publisher: Publisher,
    metrics: SinkMetrics,
    fail: Callable[[BaseException], None],
) -> tuple[BatchConsumer, Sink]:
    """Make a sink and its consumer, ready to be started; `fail` is told what they can't go on from."""
    topic_id = batches.topic_id
    incarnation = _incarnation(admin, batches)

    async def positions(partitions: Sequence[int]) -> dict[int, int]:
        nonlocal topic_id
        while True:
            try:
                # Asked for anew each time: the topic may have been deleted and made anew since.
                topic_id = (
                    await require_topics(
                        settings.client_config(), settings.declared_topics(), timeout_s=START_TIMEOUT_SECONDS
                    )
                )["batches"].topic_id
                return dict(await store.next_offsets(topic_id, partitions))
            except ServiceUnavailable as error:
                _log.warning("waiting_to_begin", error=str(error))
                await asyncio.sleep(1.0)

    async def apply(partition: int, received: Sequence[tuple[int, Any]], reject: Any, *, earliest: int) -> Any:
        if await incarnation.topic_id() not in (topic_id, None):
            raise TopicMismatch(f"{batches.name} was made anew under this sink: start it again")
        target = PartitionId(topic_id, partition, batches.name)
        return await store.apply(target, [Received(*item) for item in received], reject, earliest=earliest)

    async def dead_letter_record(message: Message, reason: str) -> asyncio.Future[None]:
        headers = dead_letter_headers(
            topic=batches.name,
            partition=message.partition(),
            offset=message.offset(),
            timestamp_ms=message.timestamp()[1],
            stage="sink",
            error_class="DecodeError",
            message=reason,
        )
        return await publisher.send(settings.dead_letter_topic, message.value(), headers=headers)

    async def dead_letter_row(partition: int, row: Row, error: RowRejected) -> asyncio.Future[None]:
        """Send the row as a report of one entry, ready to be redriven once its cause is gone."""
        headers = dead_letter_headers(
            topic=batches.name,
            partition=partition,
            offset=-1,
            stage="sink",
            error_class="RowRejected",
            message=str(error),
            sqlstate=error.sqlstate,
        )
        entry = Entry(row.key, row.value, row.error)
        report = encode_report(Report(row.agent_id, [entry], row.collected_at))
        key = row.agent_id.encode()
        return await publisher.send(settings.dead_letter_topic, report, key=key, headers=headers)

    consumer = BatchConsumer(
        settings.client_config(),
        topic=batches.name,
        group=settings.sink_group,
        session_timeout_seconds=settings.session_timeout_seconds,
        positions=positions,
        on_records=lambda partition, messages: sink.take(partition, messages),
        on_lost=lambda partitions: sink.lose(partitions),
    )
    sink = Sink(
        source=consumer,
        apply=apply,
        dead_letter_record=dead_letter_record,
        dead_letter_row=dead_letter_row,
        metrics=metrics,
        on_failure=fail,
    )
    return consumer, sink


async def _open_store(settings: Settings) -> Store:
    async with connected(settings) as connection:
        await require_schema(connection)
        if settings.undeclared == "insert":
            await require_defaults(connection)
    return await Store.connect(
        settings.database_url.get_secret_value(),
        connections=SINK_CONNECTIONS,
        undeclared=settings.undeclared,
        notify=settings.notify == "on",
    )
