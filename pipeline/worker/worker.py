"""The worker: a Faust app whose partitions fold reports into windows; it publishes closed windows and commits.

When a window closes is decided in partition.py.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

import faust
import structlog
from aiokafka.errors import GroupAuthorizationFailedError, KafkaError, TopicAuthorizationFailedError
from faust import streams
from faust.types import TP

from pipeline.clock import Clock
from pipeline.core.batch import Reason, Source, WindowSpan, encode_batch, split
from pipeline.core.tumbling import TumblingWindows
from pipeline.core.window import ClosedWindow
from pipeline.errors import ConfigError, ServiceUnavailable, TopicMismatch
from pipeline.formats.decoder import decoders
from pipeline.kafka.chunks import Chunk
from pipeline.kafka.dead_letters import DeadLetterWriter
from pipeline.kafka.publisher import Publisher
from pipeline.kafka.topics import Incarnation
from pipeline.monitoring.lag import Position
from pipeline.monitoring.metrics import WorkerMetrics
from pipeline.settings import SHUTDOWN_SECONDS, Settings
from pipeline.worker.app import new_app
from pipeline.worker.partition import SourcePartition
from pipeline.worker.table import LatestTable
from pipeline.worker.transport import ChunkConsumer, ChunkSchema

# Offsets of safe windows are committed together this often; what a crash repeats meanwhile is skipped by the sink.
COMMIT_INTERVAL_SECONDS: Final = 1.0
# How long a stop waits for a startup in progress. A group without other members assigns partitions within a second, one
# that rebalances within three.
_START_SECONDS: Final = 5.0
_REFUSALS: Final = (GroupAuthorizationFailedError, TopicAuthorizationFailedError)

_log = structlog.get_logger(__name__)


class Worker:
    """Wires Faust's app to source partitions; `run` returns after a clean stop and raises after a failure."""

    def __init__(
        self,
        settings: Settings,
        *,
        publisher: Publisher,
        dead_letters: DeadLetterWriter,
        incarnation: Incarnation,
        partitions: int,
        clock: Clock,
        metrics: WorkerMetrics,
    ) -> None:
        """Make a worker; `partitions` counts those of the events topic, and `incarnation` knows that topic's id."""
        self._settings = settings
        self._publisher = publisher
        self._dead_letters = dead_letters
        self._incarnation = incarnation
        self._clock = clock
        self._metrics = metrics
        self._windows = TumblingWindows(
            settings.window_seconds, partitions, settings.window_capacity, settings.max_clock_skew
        )
        self._new_decoder = decoders(settings)
        self._partitions: dict[int, SourcePartition] = {}
        self._committable: dict[TP, int] = {}
        self._failure: BaseException | None = None
        self._stop = asyncio.Event()
        self.app = new_app(settings)
        self.table: LatestTable = self.app.Table("latest", partitions=partitions, sources=self._partitions)
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
        """Tell whether it has stopped reading until Kafka, or the schema registry, answers."""
        return any(partition.is_held for partition in self._partitions.values())

    def unacknowledged_seconds(self) -> float:
        """Return how long the oldest closed window has waited for Kafka's acknowledgement; 0 if none waits."""
        return self._longest(partition.unacknowledged_since for partition in list(self._partitions.values()))

    def schema_wait_seconds(self) -> float:
        """Return how long a record has waited for its schema, which the registry does not return; 0 if none waits."""
        return self._longest(partition.loading_since for partition in list(self._partitions.values()))

    def _longest(self, since: Iterable[float | None]) -> float:
        return max((self._clock.now() - at for at in since if at is not None), default=0.0)

    def positions(self) -> Mapping[int, Position]:
        """Return how far each partition that it owns now is folded."""
        return {number: partition.position for number, partition in self._partitions.items()}

    def stop(self) -> None:
        """Ask `run` to close all windows, publish and commit them, and return."""
        self._stop.set()

    async def run(self) -> None:
        """Run until `stop` is called or something fails.

        Raises:
            ConfigError: Kafka refuses us a right.
            ServiceUnavailable: Kafka failed in a way that its client can't wait out.
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
            raise ServiceUnavailable(f"the worker lost Kafka: {error}; is it up? Start the worker again") from error

    async def _run(self) -> None:
        starting = asyncio.create_task(self.app.start())  # which waits for the group to give us partitions
        starting.add_done_callback(self._fail_with)
        upkeep = asyncio.create_task(self._commit_regularly())
        upkeep.add_done_callback(self._fail_with)
        waits = [asyncio.create_task(event.wait()) for event in (self._stop, self.app._crashed, self.app._stopped)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        self._failure = self._failure or self.app.crash_reason
        if self._failure is None:
            await asyncio.wait([starting], timeout=_START_SECONDS)  # a half-started app does not stop cleanly
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
            partition = self._partitions.get(event.message.partition)
            if partition is not None:  # or it was revoked while the chunk was in flight; its new owner reads it
                await partition.take(event.value)

    async def _deliver(self, number: int, closed: ClosedWindow) -> None:
        """Publish a closed window and, once all of it is acknowledged, make its offsets committable.

        Raises:
            TopicMismatch: the topic was recreated, and the window may hold records of both topics.
        """
        tp = TP(self._settings.events_topic, number)
        if await self._incarnation.topic_id() not in (self._consumer.topic_id, None):
            raise _recreated(tp.topic)
        acknowledgements = [
            await self._dead_letters.write_record(number, rejected.record, rejected.reason)
            for rejected in closed.rejected
        ]
        batches = split(
            closed.rows,
            source=Source(tp.topic, self._consumer.topic_id, number, closed.first, closed.last),
            window=WindowSpan(round(closed.start * 1e6), round(closed.end * 1e6)),
            reason=closed.reason,
            batch_size=self._settings.batch_size,
            names=closed.names,
        )
        for batch in batches:
            acknowledgements.append(
                await self._publisher.send(self._settings.batches_topic, encode_batch(batch), partition=number)
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
        """Start on the assigned partitions; records don't flow before this returns.

        Raises:
            TopicMismatch: the topic is not the one that this worker began with.
        """
        await self._abandon(self._partitions)  # left over from a rebalance that was superseded
        generation, assigned = app.consumer_generation_id, app.consumer.assignment()
        topic_id = await self._incarnation.topic_id()
        if topic_id is None:  # aiokafka would look for it again in five minutes
            raise TopicMismatch(f"{self._settings.events_topic} was deleted while this worker ran: start it again")
        if self._consumer.topic_id not in ("", topic_id):
            raise _recreated(self._settings.events_topic)
        self._consumer.topic_id = topic_id
        ends = await self._consumer.highwaters(*assigned)
        if app.consumer_generation_id != generation:
            return
        share = self._settings.open_windows_bytes // max(1, len(assigned))
        for tp in sorted(assigned):
            self._partitions[tp.partition] = SourcePartition(
                tp,
                consumer=self._consumer,
                backlog_end=ends[tp],
                decoder=self._new_decoder(),
                windows=replace(self._windows, max_bytes=share),
                clock=self._clock,
                metrics=self._metrics,
                deliver=self._deliver,
                on_failure=self._fail,
            )
        _log.info("partitions_assigned", topic=self._settings.events_topic, partitions=sorted(self._partitions))

    async def _on_revoked(self, _app: faust.App, revoked: set[TP], **_: Any) -> None:
        """Publish and commit everything before a new owner reads on: of all partitions, as Faust rebalances eagerly."""
        await self._finish("revoked")

    async def _on_shutdown(self, _app: faust.App, **_: Any) -> None:
        await self._finish("shutdown")

    async def _finish(self, reason: Reason) -> None:
        partitions = dict(self._partitions)
        self._partitions.clear()
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


def _recreated(topic: str) -> TopicMismatch:
    return TopicMismatch(f"{topic} was recreated while this worker read it: start it again")
