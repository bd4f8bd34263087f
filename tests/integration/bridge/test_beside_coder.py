"""The pipeline beside coder's own batcher: bridge, worker and sink as processes, and `shadow diff`."""

import asyncio
import json
import random
import uuid
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from pipeline.local import PackagedKafka, PackagedPostgres
from pipeline.local.process import free_port
from tests.support.coder import CODERS_TABLES, CoderReplica, declare
from tests.support.deployment import Deployment, ask, eventually

pytestmark = pytest.mark.services

SHADOW = {"own_schema": True, "notify": "off", "bridge_poll_seconds": 0.3}
# How far the clocks of coder's servers are off.
CLOCKS = [timedelta(0), timedelta(seconds=-20), timedelta(minutes=-5)]
KEYS = ["cpu", "mem"]


class Coder:
    """Servers of coder with clocks of their own, which flush when it suits them, and agents that fall silent."""

    def __init__(self, database_url, *, notifies):
        self.url = database_url
        self.replicas = [CoderReplica(database_url, notifies=notifies) for _ in CLOCKS]
        self.agents = [uuid.UUID(int=number) for number in range(1, 31)]
        self.roaming = self.agents[20:]  # the others stay with their server
        self.chance = random.Random(7)
        self.rounds_left = {agent_id: self.chance.randrange(1, 40) for agent_id in self.agents}

    async def prepare(self):
        connection = await asyncpg.connect(self.url)
        await connection.execute(CODERS_TABLES)
        await connection.execute("delete from workspace_agents")
        await declare(connection, [*self.agents, uuid.uuid4()], KEYS)  # the last one never reports
        await connection.close()

    async def run(self, rounds):
        for _ in range(rounds):
            for agent_id in self.agents:
                if self.rounds_left[agent_id] > 0:
                    self.rounds_left[agent_id] -= 1
                    number = self.chance.randrange(3) if agent_id in self.roaming else agent_id.int % 3
                    self.report(agent_id, number)
            for replica in self.replicas:
                if self.chance.random() < 0.3:
                    await replica.flush()
            await asyncio.sleep(0.05)

    def report(self, agent_id, number):
        now = datetime.now(UTC) + CLOCKS[number]
        for key in KEYS:
            value = "" if self.chance.random() < 0.1 else f"{self.chance.randrange(10)}%"
            self.replicas[number].add(agent_id, key, value, now, error="" if value else "timed out")

    async def finish(self):
        """Flush what waits; a roaming agent then reports once more, as the table may hold an older value of it."""
        for replica in reversed(self.replicas):
            await replica.flush()
        for agent_id in self.roaming:
            self.report(agent_id, 0)
        await self.replicas[0].flush()

    async def rows(self):
        connection = await asyncpg.connect(self.url)
        rows = await connection.fetch(
            "select workspace_agent_id, key, value, error, collected_at from workspace_agent_metadata"
            " where collected_at > '0001-01-01 00:00:00+00'"
        )
        await connection.close()
        return {(str(row[0]), row[1]): (row[2], row[3], row[4]) for row in rows}


@asynccontextmanager
async def pipeline_beside(deployment):
    """Start bridge, worker and sink; the bridge is ready."""
    deployment.environment["AGENT_METADATA_METRICS_PORT"] = str(port := free_port())
    bridge = deployment.start("bridge")
    deployment.environment["AGENT_METADATA_METRICS_PORT"] = "0"
    await deployment.started("worker")
    await deployment.started("sink")
    await deployment.ready(bridge, port)
    yield bridge, port
    assert deployment.stop(bridge) == 0
    assert "Traceback" not in deployment.log(bridge)


async def diff(deployment):
    code, out, err = await deployment.run("shadow", "diff", "--settle", "0", "--json")
    assert err == ""
    found = json.loads(out)
    return code, found["same"], found["different"] + found["only_live"] + found["only_shadow"] + found["unsettled"]


@pytest.mark.parametrize("notifies", [True, False], ids=["Postgres pubsub", "NATS"])
async def test_settled_tables_are_equal(deploy, database_url, notifies):
    coder = Coder(database_url, notifies=notifies)
    await coder.prepare()
    await coder.run(10)  # before the pipeline is there
    deployment = await deploy(bridge_database_url=database_url, **SHADOW)
    async with pipeline_beside(deployment) as (_, port):
        await coder.run(50)
        await coder.finish()
        rows = await coder.rows()
        assert len(rows) == len(KEYS) * len(coder.agents)
        await deployment.wait_for(rows)
        assert await diff(deployment) == (0, len(rows), 0)
        assert "agent_metadata_bridge_rows_total" in ask(port, "/metrics")[1]
        assert ask(port, "/live") == (200, "ok\n")


async def test_settled_tables_are_equal_after_outages_of_both_services(kafka_jars, tmp_path):
    with PackagedKafka(kafka_jars) as kafka, PackagedPostgres() as postgres:
        coder = Coder(postgres.database_url, notifies=False)
        await coder.prepare()
        deployment = Deployment(
            kafka.bootstrap_servers,
            postgres.database_url,
            tmp_path,
            bridge_database_url=postgres.database_url,
            **SHADOW,
        )
        await deployment.prepare()
        try:
            async with pipeline_beside(deployment) as (bridge, port):
                await coder.run(10)
                await asyncio.to_thread(kafka.stop)
                await coder.run(10)
                await eventually("it is not ready", lambda: ask(port, "/ready")[0] == 503)
                await asyncio.to_thread(kafka.start)
                await coder.run(5)
                await asyncio.to_thread(postgres.stop)
                await eventually("it is cut", lambda: deployment.logged(bridge, "bridge_cut"))
                await asyncio.to_thread(postgres.start)
                await coder.run(35)
                await coder.finish()
                rows = await coder.rows()
                assert len(rows) == len(KEYS) * len(coder.agents)
                await deployment.wait_for(rows)
                assert await diff(deployment) == (0, len(rows), 0)
                await eventually("it is ready again", lambda: ask(port, "/ready")[0] == 200)
        finally:
            deployment.close()


async def test_older_value_over_a_newer_one_is_a_difference_until_the_next_report(deploy, database_url):
    """What coder's batcher does with a report that comes late by another server, and the pipeline does not."""
    coder = Coder(database_url, notifies=True)
    await coder.prepare()
    deployment = await deploy(bridge_database_url=database_url, **SHADOW)
    agent_id = coder.agents[0]
    async with pipeline_beside(deployment):
        for number in (0, 2):
            coder.replicas[number].add(agent_id, "cpu", f"by {number}", datetime.now(UTC) + CLOCKS[number])
        await coder.replicas[0].flush()
        newer = await coder.rows()
        await deployment.wait_for(newer)
        await coder.replicas[2].flush()
        await asyncio.sleep(2)  # longer than a look, a window and a flush take
        await deployment.wait_for(newer)
        assert await diff(deployment) == (1, 0, 1)
        coder.replicas[1].add(agent_id, "cpu", "next", datetime.now(UTC))
        await coder.replicas[1].flush()
        await deployment.wait_for(await coder.rows())
        assert await diff(deployment) == (0, 1, 0)


async def test_agents_that_coder_deletes_stay_in_the_shadow(deploy, database_url):
    coder = Coder(database_url, notifies=True)
    await coder.prepare()
    deployment = await deploy(bridge_database_url=database_url, **SHADOW)
    async with pipeline_beside(deployment):
        await coder.finish()
        rows = await coder.rows()
        await deployment.wait_for(rows)
        connection = await asyncpg.connect(database_url)
        await connection.execute("delete from workspace_agents where id = $1", coder.roaming[0])
        await connection.close()
        await asyncio.sleep(1)  # longer than a look
        await deployment.wait_for(rows)
        code, out, _ = await deployment.run("shadow", "diff", "--settle", "0", "--json")
        assert (code, json.loads(out)["only_shadow"]) == (0, len(KEYS))


async def test_once_sends_the_table_and_says_how_much(deploy, database_url):
    coder = Coder(database_url, notifies=False)
    await coder.prepare()
    await coder.finish()
    deployment = await deploy(bridge_database_url=database_url, **SHADOW)
    code, out, _ = await deployment.run("bridge", "--once", "--json")
    assert (code, json.loads(out)) == (0, {"rows": 20, "reports": 10})
    await deployment.started("worker")
    await deployment.started("sink")
    await deployment.wait_for(await coder.rows())


async def test_wrong_settings_end_in_one_line(deploy, database_url):
    deployment = await deploy()
    code, _, err = await deployment.run("bridge")
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("agent-metadata: AGENT_METADATA_BRIDGE_DATABASE_URL is not set")
    deployment.environment["AGENT_METADATA_BRIDGE_DATABASE_URL"] = database_url.replace("127.0.0.1", "localhost")
    code, _, err = await deployment.run("bridge")
    assert (code, err.count("\n")) == (2, 1)
    assert "lead to the same table" in err
