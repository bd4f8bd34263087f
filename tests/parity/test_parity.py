"""metadatabatcher's cases through the real producer, worker, sink and Postgres."""

import asyncio
import uuid
from collections import Counter
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry

from pipeline.agent_ids import NOTIFY_CHANNEL, decode_agent_ids
from pipeline.metrics import SinkMetrics, WorkerMetrics
from pipeline.publisher import Publisher
from pipeline.roles import wire_sink
from pipeline.store import Store
from pipeline.testing import ManualClock
from pipeline.topic_admin import load_topic_specs, require_topics
from pipeline.worker import Worker
from tests.deployment import eventually
from tests.parity.cases import CASES, Add, Advance, Case, Close, Expect

pytestmark = pytest.mark.services

T0 = datetime(2024, 1, 1, tzinfo=UTC)


def agent_id(number: int) -> uuid.UUID:
    return uuid.uuid5(uuid.NAMESPACE_OID, str(number))


class Batcher:
    """Worker and sink in this process, on a clock that the case moves."""

    def __init__(self, pipeline, stack: AsyncExitStack) -> None:
        self._pipeline = pipeline
        self._stack = stack
        self.clock = ManualClock(T0.timestamp())
        self._registry = CollectorRegistry()
        self._payloads: list[str] = []
        self._added = 0
        self._producer = pipeline.producer()

    async def start(self, declared) -> None:
        settings, connection = self._pipeline.settings, self._pipeline.connection()
        self._listening = await self._stack.enter_async_context(connection)
        await self._listening.add_listener(NOTIFY_CHANNEL, lambda *notice: self._payloads.append(notice[3]))
        await self._listening.executemany(
            "insert into workspace_agent_metadata (workspace_agent_id, key) values ($1, $2)", declared
        )
        specs = load_topic_specs(names=settings.topic_names)
        topics = require_topics(settings.client_config(), specs, timeout_s=10)
        publisher = Publisher(settings.client_config())
        self._stack.push_async_callback(publisher.close, 5)
        store = await Store.connect(
            settings.database_url.get_secret_value(), connections=2, undeclared="ignore", notify=True
        )
        self._stack.push_async_callback(store.close)
        failures: list[BaseException] = []
        consumer, sink = wire_sink(
            settings, topics["batches"], store, publisher, SinkMetrics(self._registry), failures.append
        )
        consumer.start()
        self._stack.push_async_callback(consumer.close)
        self._stack.callback(sink.lose, range(1))

        async def events_topic_id() -> str:
            return topics["events"].topic_id

        self._worker = Worker(
            settings,
            send=publisher.send,
            dead_letter=lambda *_: pytest.fail("nothing here is bad"),
            events_topic_id=events_topic_id,
            partitions=1,
            clock=self.clock,
            metrics=WorkerMetrics(CollectorRegistry()),
        )
        self._run = asyncio.create_task(self._worker.run())
        self._stack.push_async_callback(self.close)
        await eventually("the worker owns its partition", lambda: self._worker.is_assigned)
        await eventually("the sink owns its partition", lambda: consumer.is_assigned)

    async def do(self, step) -> None:
        match step:
            case Add():
                keys, values = list(step.values), list(step.values.values())
                at = T0 + timedelta(seconds=step.at)
                assert self._producer.add(agent_id(step.agent), keys, values, [""] * len(keys), at)
                self._added += 1
            case Advance():
                await self._settled()
                await self.clock.advance(step.seconds)
            case Close():
                await self._settled()
                await self.close()
            case Expect():
                await self._settled()
                await self._expect(step)

    async def close(self) -> None:
        self._worker.stop()
        await self._run

    async def _settled(self) -> None:
        """Wait until the worker has folded what was added."""
        self._producer.flush()
        await eventually("the reports are folded", lambda: self._worker.folded_records >= self._added)

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
        if expected.rows is not None:
            rows = {
                (agent_id(number), key): (value, T0 + timedelta(seconds=at))
                for (number, key), (value, at) in expected.rows.items()
            }
            held = await self._listening.fetch(
                "select workspace_agent_id, key, value, collected_at from workspace_agent_metadata "
                "where collected_at > '0001-01-02'"
            )
            assert {(row[0], row[1]): (row[2], row[3]) for row in held} == rows

    def _value(self, name: str, **labels: str) -> float:
        return self._registry.get_sample_value(name, labels) or 0


REASONS = ("scheduled", "capacity", "shutdown", "revoked")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
async def test_parity(case: Case, deploy):
    pipeline = await deploy(
        partitions=1, window_seconds=5, window_capacity=case.batch, batch_size=case.batch, undeclared="ignore"
    )
    declared = {(agent_id(step.agent), key) for step in case.steps if isinstance(step, Add) for key in step.values}
    async with AsyncExitStack() as stack:
        batcher = Batcher(pipeline, stack)
        await batcher.start(sorted(declared))
        for step in case.steps:
            await batcher.do(step)
