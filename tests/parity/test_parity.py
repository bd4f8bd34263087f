"""metadatabatcher's cases through the real producer, worker, sink and Postgres."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry

from pipeline.core.notify import NOTIFY_CHANNEL, decode_agent_ids
from pipeline.kafka.admin import KafkaAdmin
from pipeline.kafka.publisher import Publisher
from pipeline.kafka.topics import Incarnation, load_topic_specs, require_topics
from pipeline.monitoring.metrics import SinkMetrics, WorkerMetrics
from pipeline.postgres.rows import read_rows
from pipeline.postgres.store import Store
from pipeline.sink import BatchConsumer, BatchesTopic, Sink
from pipeline.testing import ManualClock
from pipeline.worker import Worker
from tests.parity.cases import (
    CASES,
    DIFFERENCES,
    Add,
    AddAtOnce,
    Advance,
    Block,
    Case,
    Close,
    Expect,
    Fail,
    FailNotify,
    Restore,
    Text,
    Tried,
)
from tests.support.deployment import eventually

pytestmark = pytest.mark.services

T0 = datetime(2024, 1, 1, tzinfo=UTC)


NEVER = "timestamptz '0001-01-01 00:00:00+00'"  # asyncpg would make -infinity of datetime.min
THE_SINKS = "from pg_stat_activity where datname = current_database() and application_name = 'agent-metadata-sink'"
# Found before pg_catalog's by the search path that goes with it; 53000 is "insufficient resources": an outage.
BROKEN_NOTIFY = """
create schema broken;
create function broken.pg_notify(text, text) returns void language plpgsql
as 'begin raise exception ''the queue is full'' using errcode = ''53000''; end'
"""


def moment(at: float | None) -> datetime | None:
    return None if at is None else T0 + timedelta(seconds=at)


def split_text(text: Text) -> tuple[str, str]:
    return (text, "") if isinstance(text, str) else text


def agent_id(number: int) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_OID, str(number))


class Batcher:
    """Worker and sink in this process, on a clock that the case moves."""

    def __init__(self, pipeline, stack: AsyncExitStack) -> None:
        self._pipeline = pipeline
        self._stack = stack
        self.clock = ManualClock(T0.timestamp())
        self._registry = CollectorRegistry()
        self._workers_registry = CollectorRegistry()
        self._payloads: list[str] = []
        self._added = 0
        self._blocking = None
        self._started = datetime.now(UTC).replace(microsecond=0)  # the broker counts milliseconds
        self._producer = pipeline.producer()

    async def start(self, declared) -> None:
        settings, connection = self._pipeline.settings, self._pipeline.connection()
        self._listening = await self._stack.enter_async_context(connection)
        await self._listening.add_listener(NOTIFY_CHANNEL, lambda *notice: self._payloads.append(notice[3]))
        self._control = await self._stack.enter_async_context(self._pipeline.connection())
        await self._listening.executemany(
            "insert into workspace_agent_metadata (workspace_agent_id, key) values ($1, $2)", declared
        )
        specs = load_topic_specs(names=settings.topic_names)
        topics = await require_topics(settings.client_config(), specs, timeout_s=10)
        publisher = Publisher(settings.client_config())
        self._stack.push_async_callback(publisher.close, 5)
        store = await Store.connect(
            settings.database_url.get_secret_value(), connections=2, undeclared=settings.undeclared, notify=True
        )
        self._stack.push_async_callback(store.close)
        failures: list[BaseException] = []
        admin = KafkaAdmin(settings.client_config())
        topic = BatchesTopic(settings, topics["batches"], store, Incarnation.of(topics["batches"], admin))
        consumer = BatchConsumer(
            settings.client_config(),
            topic=settings.batches_topic,
            group=settings.sink_group,
            session_timeout_seconds=settings.session_timeout_seconds,
            locate=topic.locate,
        )
        sink = Sink(
            consumer=consumer,
            topic=topic,
            dead_letters=None,  # nothing here is bad
            metrics=SinkMetrics(self._registry),
            on_failure=failures.append,
        )
        sink.start()
        self._stack.push_async_callback(consumer.close)
        self._stack.callback(sink.lose, range(1))
        self._worker = Worker(
            settings,
            publisher=publisher,
            dead_letters=None,
            incarnation=Incarnation.of(topics["events"], admin),
            partitions=1,
            clock=self.clock,
            metrics=WorkerMetrics(self._workers_registry),
        )
        self._run = asyncio.create_task(self._worker.run())
        self._stack.push_async_callback(self.close)
        await eventually("the worker owns its partition", lambda: self._worker.is_assigned)
        await eventually("the sink owns its partition", lambda: consumer.is_assigned)

    async def do(self, step) -> None:
        match step:
            case Add():
                self._add(step)
            case AddAtOnce():
                with ThreadPoolExecutor(len(step.agents)) as threads:
                    list(threads.map(lambda agent: self._add_many(agent, step.reports), step.agents))
                self._added += len(step.agents) * step.reports
            case Advance():
                await self._settled()
                await self.clock.advance(step.seconds)
            case Close():
                await self._settled()
                await self.close()
            case Expect():
                await self._settled()
                await self._expect(step)
            case Tried():
                await eventually("a write waits or has failed", self._is_held_up)
            case Block() | Fail() | FailNotify() | Restore():
                await self._database(step)

    def _add(self, step: Add) -> None:
        keys, texts = [key for key, _ in step.pairs], [split_text(text) for _, text in step.pairs]
        times = [moment(at) for at in step.at] if isinstance(step.at, Sequence) else moment(step.at)
        values, errors = [value for value, _ in texts], [error for _, error in texts]
        if step.refused is None:
            assert self._producer.add(agent_id(step.agent), keys, values, errors, times)
            self._added += bool(keys)
        else:
            with pytest.raises(ValueError, match=step.refused):
                self._producer.add(agent_id(step.agent), keys, values, errors, times)
            self._added += "same length" not in step.refused

    def _add_many(self, agent: int, reports: int) -> None:
        for number in range(reports):
            assert self._producer.add(agent_id(agent), [f"{number}"], ["v"], [""], T0)

    async def _database(self, step) -> None:
        name = await self._control.fetchval("select quote_ident(current_database())")
        match step:
            case Block():
                self._blocking = self._control.transaction()
                await self._blocking.start()
                await self._control.execute("lock table workspace_agent_metadata in exclusive mode")
                return
            case Fail():
                await self._control.execute(f"alter database {name} set default_transaction_read_only = on")
            case FailNotify():
                await self._control.execute(BROKEN_NOTIFY)
                await self._control.execute(f"alter database {name} set search_path = broken, pg_catalog, public")
            case Restore() if self._blocking is not None:
                await self._blocking.rollback()
                self._blocking = None
                return
            case Restore():
                await self._control.execute(f"alter database {name} reset all")
        await self._control.execute(f"select pg_terminate_backend(pid) {THE_SINKS} and pid <> pg_backend_pid()")

    async def _is_held_up(self) -> bool:
        if self._blocking is None:
            return self._value("agent_metadata_failed_flushes_total") > 0
        return bool(await self._listening.fetch(f"select 1 {THE_SINKS} and wait_event_type = 'Lock'"))

    async def close(self) -> None:
        self._worker.stop()
        await self._run

    async def _settled(self) -> None:
        """Wait until the worker has folded what was added."""
        self._producer.flush()
        await eventually("the reports are folded", lambda: self._folded() >= self._added)

    def _folded(self) -> float:
        return self._workers_registry.get_sample_value("agent_metadata_records_total")

    async def _expect(self, expected: Expect) -> None:
        await eventually(
            "the entries are flushed", lambda: self._value("agent_metadata_flushed_total") >= expected.flushed
        )
        batches = {reason: self._value("agent_metadata_batches_total", reason=reason) for reason in REASONS}
        assert {reason: count for reason, count in batches.items() if count} == expected.batches
        assert self._value("agent_metadata_flushed_total") == expected.flushed
        await self._listening.fetchval("select 1")  # notifications come with the next answer
        told = [decode_agent_ids(payload) for payload in self._payloads]
        self._payloads.clear()
        assert {agent for payload in told for agent in payload} == {agent_id(number) for number in expected.told}
        if expected.payload_ids is not None:
            assert Counter(map(len, told)) == Counter(expected.payload_ids)
        for name, observed in (("batch_size", expected.sizes), ("batch_utilization", expected.utilization)):
            if observed is not None:
                metric = f"agent_metadata_{name}"
                assert (self._value(f"{metric}_count"), self._value(f"{metric}_sum")) == observed
        if expected.rows is not None:
            await self._expect_rows(expected.rows)
        if expected.never:
            held = await self._listening.fetch(
                "select workspace_agent_id, key, value, error from workspace_agent_metadata "
                f"where collected_at = {NEVER}"
            )
            assert {tuple(row) for row in held} == {(agent_id(number), key, "", "") for number, key in expected.never}

    async def _expect_rows(self, expected) -> None:
        held = await self._listening.fetch(
            "select workspace_agent_id, key, value, error, collected_at from workspace_agent_metadata "
            f"where collected_at > {NEVER}"
        )
        found = {(row[0], row[1]): (row[2], row[3]) for row in held}
        assert found == {(agent_id(number), key): split_text(text) for (number, key), (text, _) in expected.items()}
        times = {(row[0], row[1]): row[4] for row in held}
        for (number, key), (_, at) in expected.items():
            if at is not None:
                assert times.pop((agent_id(number), key)) == moment(at)
        assert len(set(times.values())) <= 1  # the server's, one for all keys of a report
        assert all(self._started <= at <= datetime.now(UTC) for at in times.values())

    def _value(self, name: str, **labels: str) -> float:
        return self._registry.get_sample_value(name, labels) or 0


REASONS = ("scheduled", "capacity", "shutdown", "revoked")


@pytest.mark.parametrize("case", [*CASES, *DIFFERENCES], ids=lambda case: case.name)
async def test_parity(case: Case, deploy):
    pipeline = await deploy(
        partitions=1,
        window_seconds=5,
        window_capacity=case.capacity or case.batch,
        batch_size=case.batch,
        undeclared=case.undeclared,
    )
    adds = [step for step in case.steps if isinstance(step, Add) and step.is_declared]
    declared = {(agent_id(step.agent), key) for step in adds for key, _ in step.pairs}
    for step in case.steps:
        if isinstance(step, AddAtOnce):
            declared |= {(agent_id(agent), f"{number}") for agent in step.agents for number in range(step.reports)}
    async with AsyncExitStack() as stack:
        batcher = Batcher(pipeline, stack)
        await batcher.start(sorted(declared))
        for step in case.steps:
            await batcher.do(step)


async def test_rows_are_read_in_display_order_then_by_key(deploy):
    pipeline = await deploy(partitions=1)
    async with pipeline.connection() as connection:
        await connection.executemany(
            "insert into workspace_agent_metadata (workspace_agent_id, key, display_order) values ($1, $2, $3)",
            [(agent_id(1), f"foo{number}", order) for number, order in ((1, 2), (2, 1), (3, 2), (4, 3))],
        )
        rows = await read_rows(connection, [agent_id(1)])
    assert [row.key for row in rows] == ["foo2", "foo1", "foo3", "foo4"]
