"""The worker: a Faust app that folds reports into windows and publishes each closed window as batches.

The order that nothing is lost by: publish all parts of a window, wait for Kafka's acknowledgements, then commit the
source offsets it stands for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final, Protocol

import faust
import mode
import structlog
from aiokafka.errors import GroupAuthorizationFailedError, KafkaError, TopicAuthorizationFailedError
from faust import streams
from faust.types import TP

from pipeline.clock import Clock
from pipeline.core.batch import Source, Window, encode_batch, split
from pipeline.core.report import PARSE_ERRORS, parse_report, timestamp_us
from pipeline.core.window import ClosedWindow, Record, Rejected
from pipeline.errors import ConfigError, ServiceUnavailable, TopicMismatch
from pipeline.kafka.chunks import FETCH_BYTES, Chunk
from pipeline.kafka.credentials import faust_credentials
from pipeline.monitoring.lag import Position
from pipeline.monitoring.metrics import WorkerMetrics
from pipeline.settings import SHUTDOWN_SECONDS, Settings
from pipeline.worker.partition import SourcePartition
from pipeline.worker.table import LatestTable, LatestTables
from pipeline.worker.transport import ChunkApp, ChunkConsumer, ChunkSchema

# Offsets of safe windows are committed together this often; what a crash repeats meanwhile is skipped by the sink.
COMMIT_INTERVAL_SECONDS: Final = 1.0
# Chunks that may wait in the stream: each has some thousand records, or one record however large.
_STREAM_BUFFER_CHUNKS: Final = 16
_YEAR_SECONDS: Final = 31_536_000
# A group that no one else is in gives partitions within a second, and one that rebalances within three.
_START_SECONDS: Final = 5.0
_REFUSALS: Final = (GroupAuthorizationFailedError, TopicAuthorizationFailedError)

_log = structlog.get_logger(__name__)


class Send(Protocol):
    """Queues a record for Kafka; the future is done when it is acknowledged."""

    async def __call__(  # noqa: D102
        self,
        topic: str,
        value: bytes | None,
        *,
        partition: int = -1,
        key: bytes | None = None,
        headers: Sequence[tuple[str, bytes]] = (),
    ) -> asyncio.Future[None]: ...


DeadLetter = Callable[[Rejected, int], Awaitable[asyncio.Future[None]]]


class Worker:
    """Wires Faust's app to source partitions; `run` returns after a clean stop and raises after a failure.

    `events_topic_id()` asks Kafka for the id of the events topic as it is now, None if it is deleted, and waits out
    Kafka's absence.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        send: Send,
        dead_letter: DeadLetter,
        events_topic_id: Callable[[], Awaitable[str | None]],
        partitions: int,
        clock: Clock,
        metrics: WorkerMetrics,
    ) -> None:
        self._settings = settings
        self._send = send
        self._dead_letter = dead_letter
        self._ask_events_topic_id = events_topic_id
        self._clock = clock
        self._metrics = metrics
        self._partitions: dict[int, SourcePartition] = {}
        # What waited in the topic when a partition was assigned, until it has been read.
        self._backlog_ends: dict[int, int] = {}
        self._committable: dict[TP, int] = {}
        self.folded_records = 0  # since the start, in whatever windows
        self._failure: BaseException | None = None
        self._stop = asyncio.Event()
        self.app = _new_app(settings)
        self.table: LatestTable = self.app.Table(
            "latest",
            partitions=partitions,
            capacity=settings.window_capacity,
            max_clock_skew=settings.max_clock_skew,
        ).tumbling(settings.window_seconds)
        events = self.app.topic(settings.events_topic, schema=ChunkSchema(), acks=False)
        self.app.agent(events, name="fold")(self._fold)
        self.app.on_rebalance_complete.connect(self._on_rebalance_complete)
        self.app.on_partitions_revoked.connect(self._on_revoked)
        self.app.on_before_shutdown.connect(self._on_shutdown)

    @property
    def is_assigned(self) -> bool:
        """Tell whether this worker owns partitions now."""
        return bool(self._partitions)

    @property
    def is_held(self) -> bool:
        """Tell whether it reads on only when Kafka has acknowledged what it published."""
        return any(partition.is_held for partition in self._partitions.values())

    def unacknowledged_seconds(self) -> float:
        """Return how long the oldest closed window has waited for Kafka's acknowledgement; 0 if none waits."""
        since = [partition.unacknowledged_since for partition in list(self._partitions.values())]
        return max((self._clock.now() - at for at in since if at is not None), default=0.0)

    def positions(self) -> Mapping[int, Position]:
        """Return how far each partition that it owns now is folded."""
        positions = {}
        for number, partition in self._partitions.items():
            next_offset = partition.next_offset
            if next_offset is None:  # nothing read yet
                next_offset = self._consumer.committed_offset(TP(self._settings.events_topic, number)) or 0
            positions[number] = Position(next_offset, next_offset, partition.appended_at)
        return positions

    def stop(self) -> None:
        """Ask `run` to close all windows, publish and commit them, and return."""
        self._stop.set()

    async def run(self) -> None:
        """Run until `stop` is called or something fails.

        Raises:
            ConfigError: Kafka refuses us a right.
            ServiceUnavailable: Kafka went away in a way that its client can't wait out.
            Whatever else failed. Nothing that was not safe is committed then, and a new start reads it again.
        """
        try:
            await self._run()
        except _REFUSALS as error:
            events, group = self._settings.events_topic, self._settings.worker_group
            raise ConfigError(
                f"Kafka refuses the worker: {error}; it needs READ on topic {events} and on group {group}"
            ) from error
        except KafkaError as error:
            raise ServiceUnavailable(f"the worker lost Kafka: {error}; is it up? start it again") from error

    async def _run(self) -> None:
        starting = asyncio.create_task(self.app.start())  # which waits for the group to give us partitions
        starting.add_done_callback(self._fail_with)
        upkeep = asyncio.create_task(self._commit_regularly())
        upkeep.add_done_callback(self._fail_with)
        waits = [asyncio.create_task(event.wait()) for event in (self._stop, self.app._crashed, self.app._stopped)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self._failure = self._failure or self.app.crash_reason
        if self._failure is None:
            await asyncio.wait([starting], timeout=_START_SECONDS)  # what is half started stops badly
        for task in (starting, upkeep, *waits):
            task.cancel()
        try:
            await self.app.stop()
        except Exception:
            if self._failure is None:
                raise
            _log.debug("stop_after_failure_failed", exc_info=True)
        if self._failure is not None:
            raise self._failure

    async def _fold(self, stream: streams.Stream[Chunk]) -> None:
        async for event in stream.events():
            await self._take(event.message.partition, event.value)

    async def _take(self, number: int, chunk: Chunk) -> None:
        tp = TP(self._settings.events_topic, number)
        partition = self._partitions.get(number)
        if partition is None:
            return  # revoked while this chunk was on its way; its new owner reads it
        expected = partition.next_offset if partition.next_offset is not None else self._consumer.committed_offset(tp)
        if expected is not None and chunk.start != expected:
            reconciled = await self._reconcile(tp, expected, chunk)
            if reconciled is None:
                return
            chunk = reconciled
        last: Record | None = None
        for records in chunk.slices():
            self._metrics.records.inc(len(records))
            await partition.take(records)
            self.folded_records += len(records)
            last = records[-1]
        partition.next_offset = chunk.next_offset
        if last is not None:
            partition.appended_at = last.timestamp / 1000
            self._observe_produced(last)
        backlog_end = self._backlog_ends.get(number)
        if backlog_end is not None and chunk.next_offset >= backlog_end:
            del self._backlog_ends[number]
            if chunk.start < backlog_end:
                await partition.close_caught_up()

    def _observe_produced(self, record: Record) -> None:
        """Sample how old a report was when Kafka had it: one a chunk, as the fold has no time for more."""
        try:
            collected_at = parse_report(record.value or b"").collected_at
        except PARSE_ERRORS:
            return
        if collected_at is not None:
            collected_at_s = timestamp_us(collected_at) / 1e6
            self._metrics.freshness.observe("produced", collected_at=collected_at_s, at=record.timestamp / 1000)

    async def _reconcile(self, tp: TP, expected: int, chunk: Chunk) -> Chunk | None:
        """Make a chunk follow the one before it; None if it is to be passed over.

        Raises:
            TopicMismatch: the topic was deleted and made anew; a new start reads it from its beginning.
        """
        if chunk.start < expected:  # after a seek back, or of another topic of the same name
            if self._consumer.highwater(tp) < expected:
                raise _made_anew(tp.topic)
            return chunk._replace(start=expected) if chunk.next_offset > expected else None
        earliest = (await self._consumer.earliest_offsets(tp))[tp]
        if earliest <= expected:
            _log.warning("chunk_skipped_going_back", partition=tp.partition, expected=expected, got=chunk.start)
            await self._consumer.seek(tp, expected)
            return None
        self._metrics.lost_records.inc(earliest - expected)
        _log.warning(
            "records_lost_to_retention",
            partition=tp.partition,
            count=earliest - expected,
            advice="lengthen the events topic's retention.ms or add workers",
        )
        return chunk

    async def _deliver(self, number: int, closed: ClosedWindow) -> None:
        """Publish a closed window and, once all of it is acknowledged, make its offsets committable.

        Raises:
            TopicMismatch: the window may hold records of a topic that was made anew, from where the old one was left.
        """
        tp = TP(self._settings.events_topic, number)
        if await self._ask_events_topic_id() not in (self._consumer.topic_id, None):
            raise _made_anew(tp.topic)
        acknowledgements = [await self._dead_letter(rejected, number) for rejected in closed.rejected]
        batches = split(
            closed.rows,
            source=Source(tp.topic, self._consumer.topic_id, number, closed.first, closed.last),
            window=Window(round(closed.start * 1e6), round(closed.end * 1e6)),
            reason=closed.reason,
            batch_size=self._settings.batch_size,
        )
        for batch in batches:
            acknowledgements.append(
                await self._send(self._settings.batches_topic, encode_batch(batch), partition=number)
            )
            self._metrics.freshness.observe("window_closed", collected_at=batch.sampled_time, at=closed.end)
            await asyncio.sleep(0)  # a large window has hundreds of parts; let heartbeats and timers run
        await asyncio.gather(*acknowledgements)
        self._committable[tp] = closed.last + 1
        self._metrics.windows.labels(closed.reason).inc()
        self._metrics.entries.inc(closed.entries)
        self._metrics.rows.inc(len(closed.rows))
        for kind, count in Counter(rejected.kind for rejected in closed.rejected).items():
            self._metrics.dead_letters.labels(kind).inc(count)
        self._metrics.clamped_clocks.inc(closed.clamped)

    async def _commit(self) -> None:
        committable, self._committable = self._committable, {}
        if committable:
            await self._consumer.commit_offsets(committable)

    async def _commit_regularly(self) -> None:
        while True:
            await asyncio.sleep(COMMIT_INTERVAL_SECONDS)
            await self._consumer.check_errors()
            if not self.app.rebalancing:
                await self._commit()
            self._metrics.show_open_pairs(self.table.open_pairs())

    async def _on_rebalance_complete(self, app: faust.App, **_: Any) -> None:
        """Take up the partitions; records don't flow before this returns.

        Raises:
            TopicMismatch: the topic is not the one that this worker began with.
        """
        await self._abandon(self._partitions)  # of a rebalance that another one overtook
        generation, assigned = app.consumer_generation_id, app.consumer.assignment()
        topic_id = await self._ask_events_topic_id()
        if topic_id is None:  # aiokafka would look for it again in five minutes
            raise TopicMismatch(f"{self._settings.events_topic} was deleted under this worker: start it again")
        if self._consumer.topic_id not in ("", topic_id):
            raise _made_anew(self._settings.events_topic)
        self._consumer.topic_id = topic_id
        ends = await self._consumer.highwaters(*assigned)
        if app.consumer_generation_id != generation:
            return
        self._backlog_ends = {tp.partition: end for tp, end in ends.items()}
        numbers = sorted(tp.partition for tp in assigned)
        for number in numbers:
            self._partitions[number] = SourcePartition(
                number, windows=self.table, clock=self._clock, deliver=self._deliver, on_failure=self._fail
            )
        _log.info("partitions_assigned", topic=self._settings.events_topic, partitions=numbers)

    async def _on_revoked(self, _app: faust.App, revoked: set[TP], **_: Any) -> None:
        """Bring everything out before another worker reads on; all partitions go, as Faust's protocol is eager."""
        await self._finish("revoked")

    async def _on_shutdown(self, _app: faust.App, **_: Any) -> None:
        await self._finish("shutdown")

    async def _finish(self, reason: Any) -> None:
        partitions, self._partitions = self._partitions, {}
        self._metrics.consumer.show_lags({})
        try:
            async with asyncio.timeout(SHUTDOWN_SECONDS):
                if self._failure is None:
                    await asyncio.gather(*(partition.finish(reason) for partition in partitions.values()))
                    await self._commit()
        except TimeoutError:
            _log.warning("windows_left_unpublished", reason=reason, advice="they will be read again from Kafka")
        finally:
            await self._abandon(partitions)
            self._committable.clear()
            self._metrics.show_open_pairs(self.table.open_pairs())

    async def _abandon(self, partitions: dict[int, SourcePartition]) -> None:
        while partitions:
            _, partition = partitions.popitem()
            await partition.abandon()

    def _fail_with(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._stop.set()

    @property
    def _consumer(self) -> ChunkConsumer:
        consumer: ChunkConsumer = self.app.consumer
        return consumer


def _made_anew(topic: str) -> TopicMismatch:
    return TopicMismatch(f"{topic} was made anew under this worker: start it again")


def _new_app(settings: Settings) -> ChunkApp:
    if streams._CStreamIterator is None:
        raise ConfigError("Faust runs without its compiled parts and would skip events: unset NO_CYTHON, reinstall")
    for subclass in (ChunkApp, LatestTable):
        # Faust's services log under the module of their class, and each start and stop of theirs is no news.
        logging.getLogger(subclass.__module__).setLevel(logging.WARNING)
    session = settings.session_timeout_seconds
    return ChunkApp(
        settings.worker_group,
        broker=";".join(f"kafka://{server.strip()}" for server in settings.kafka_bootstrap_servers.split(",")),
        broker_credentials=faust_credentials(settings),
        Table=LatestTable,
        TableManager=LatestTables,
        store="memory://",
        autodiscover=False,
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        table_standby_replicas=0,
        agent_supervisor=mode.CrashingSupervisor,
        cython_optimizations=True,
        stream_wait_empty=False,
        stream_buffer_maxsize=_STREAM_BUFFER_CHUNKS,
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=FETCH_BYTES,
        broker_max_poll_records=16,
        broker_max_poll_interval=_YEAR_SECONDS,  # a worker without partitions, or held up by Kafka, stays in the group
        broker_session_timeout=session,
        broker_heartbeat_interval=session / 3,
        broker_request_timeout=max(40.0, session),
        broker_rebalance_timeout=60.0,
        worker_redirect_stdouts=False,
    )
