"""kill -9 of the worker in mid-window and of the sink in mid-transaction: nothing lost, nothing twice."""

import asyncio
import uuid
from datetime import UTC, datetime

import pytest

from tests.deployment import eventually

pytestmark = pytest.mark.services

AGENTS = [uuid.uuid5(uuid.NAMESPACE_OID, str(number)) for number in range(300)]

# Counts how often each (row, collected_at) was written: a batch applied twice would write one a second time.
AUDIT = """
create table audit (agent_id uuid, key text, collected_at timestamptz, went_back boolean);
create function note() returns trigger language plpgsql as $$
begin
    insert into audit values (
        new.workspace_agent_id, new.key, new.collected_at, tg_op = 'UPDATE' and new.collected_at < old.collected_at
    );
    return new;
end $$;
create trigger note after insert or update on workspace_agent_metadata for each row execute function note();
"""


class Load:
    """Reports of all agents, round after round; the oracle knows the newest acknowledged value of each pair."""

    def __init__(self, pipeline):
        self._pipeline = pipeline
        self._stop = asyncio.Event()
        self.expected = {}
        self.rounds = 0

    async def run(self):
        with self._pipeline.producer() as producer:
            while not self._stop.is_set():
                now = datetime.now(UTC)
                for agent_id in AGENTS:
                    values = [f"{self.rounds}", f"{self.rounds} MB"]
                    assert producer.add(agent_id, ["cpu", "mem"], values, ["", ""], now)
                    for key, value in zip(("cpu", "mem"), values, strict=True):
                        self.expected[str(agent_id), key] = (value, "", now)
                assert producer.flush() == 0
                self.rounds += 1
                await asyncio.sleep(0.02)

    def stop(self):
        self._stop.set()


async def audited(pipeline):
    async with pipeline.connection() as connection:
        twice = await connection.fetchval(
            "select count(*) from (select from audit group by agent_id, key, collected_at having count(*) > 1) as again"
        )
        back = await connection.fetchval("select count(*) from audit where went_back")
    return {"written twice": twice, "moved back": back}


async def test_killed_workers_lose_nothing_and_write_nothing_twice(deploy):
    pipeline = await deploy(window_seconds=1)
    async with pipeline.connection() as connection:
        await connection.execute(AUDIT)
    await pipeline.started("sink")
    worker = await pipeline.started("worker")
    load = Load(pipeline)
    loading = asyncio.create_task(load.run())
    for _ in range(3):
        await eventually("rows are written", pipeline.table)
        rounds = load.rounds
        await eventually("a window is under way", lambda rounds=rounds: load.rounds > rounds + 10)
        pipeline.kill(worker)
        worker = await pipeline.started("worker")
    load.stop()
    await loading
    await pipeline.wait_for(load.expected)
    assert await audited(pipeline) == {"written twice": 0, "moved back": 0}


async def test_killed_sinks_lose_nothing_and_write_nothing_twice(deploy):
    pipeline = await deploy(window_seconds=0.3)
    async with pipeline.connection() as connection:
        await connection.execute(AUDIT)
    sink = await pipeline.started("sink")
    await pipeline.started("worker")
    load = Load(pipeline)
    loading = asyncio.create_task(load.run())
    for _ in range(3):
        await eventually("rows are written", pipeline.table)
        async with pipeline.connection() as holding, holding.transaction():
            # A lock on one row stops the sink in the middle of its transaction: rows written, nothing committed.
            await holding.execute(
                "select from workspace_agent_metadata order by workspace_agent_id desc limit 1 for update"
            )
            await eventually("the sink waits in its transaction", lambda: is_waiting(pipeline))
            pipeline.kill(sink)
        sink = await pipeline.started("sink")
    load.stop()
    await loading
    await pipeline.wait_for(load.expected)
    assert await audited(pipeline) == {"written twice": 0, "moved back": 0}


async def is_waiting(pipeline):
    async with pipeline.connection() as connection:
        return await connection.fetchval(
            "select count(*) from pg_stat_activity "
            "where application_name = 'agent-metadata-sink' and wait_event_type = 'Lock' "
            "and datname = current_database()"
        )
