"""A table that was emptied, by a crash or by hand, is right again by itself."""

import asyncio
import json
import os
import signal
import socket
import urllib.error
import urllib.request
import uuid
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from pipeline.errors import ServiceUnavailable
from pipeline.local import PackagedPostgres
from pipeline.postgres.migrations import migrate
from pipeline.postgres.store import Store
from tests.support.deployment import Deployment, eventually

pytestmark = pytest.mark.services

AGENTS = [uuid.uuid5(uuid.NAMESPACE_OID, str(number)) for number in range(200)]
HOUR = timedelta(hours=1)


def produce(pipeline, *, age=timedelta(0), agents=AGENTS, value="v"):
    at = datetime.now(UTC) - age
    with pipeline.producer() as producer:
        for agent_id in agents:
            assert producer.add(agent_id, ["cpu", "mem"], [value, "1 GB"], ["", ""], at)
    return {(str(agent), key): (text, "", at) for agent in agents for key, text in (("cpu", value), ("mem", "1 GB"))}


def free_port():
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def why_not_ready(port):
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/ready", timeout=5):
            return None
    except urllib.error.HTTPError as error:
        return error.read().decode()


async def execute(pipeline, sql):
    async with pipeline.connection() as connection:
        await connection.execute(sql)


async def test_truncated_table_is_noticed_refilled_and_ready_again(deploy):
    pipeline = await deploy(window_seconds=0.2)
    await pipeline.started("worker")
    port = pipeline.environment["AGENT_METADATA_METRICS_PORT"] = str(free_port())
    sink = await pipeline.started("sink")
    expected = produce(pipeline)
    await pipeline.wait_for(expected)
    async with pipeline.connection() as holding, holding.transaction():
        await execute(pipeline, "truncate workspace_agent_metadata")
        # This holds the refill up, so that /ready can be queried meanwhile.
        await holding.execute("lock table workspace_agent_metadata in share mode")
        said = await eventually("/ready is false", lambda: why_not_ready(port))
        assert said == "the table was emptied, and is being refilled\n"
    await pipeline.wait_for(expected)
    await eventually("/ready is true", lambda: why_not_ready(port) is None)
    assert len(pipeline.logged(sink, "table_refilled")) == 1
    async with pipeline.connection() as connection:
        await connection.execute("vacuum full workspace_agent_metadata")
    await eventually("a rewrite is taken for it, and changes nothing", lambda: refills(pipeline, sink) == [400, 0])
    assert await pipeline.table() == expected


def refills(pipeline, sink):
    return [entry["rows"] for entry in pipeline.logged(sink, "table_refilled")]


async def test_unlogged_table_is_right_again_after_each_crash_of_postgres_under_load(bootstrap_servers, tmp_path):
    with PackagedPostgres(durable=False) as postgres:
        pipeline = Deployment(bootstrap_servers, postgres.database_url, tmp_path, window_seconds=0.3, unlogged=True)
        try:
            await pipeline.prepare()
            async with pipeline.connection() as connection:
                await migrate(connection, unlogged=True)
            await pipeline.started("worker")
            sink = await pipeline.started("sink")
            expected = produce(pipeline, age=HOUR)  # rows that no live report will bring back
            await pipeline.wait_for(expected)
            for crash in range(1, 3):
                live = asyncio.create_task(load(pipeline, 20))
                await asyncio.sleep(0.2)  # somewhere in the load
                await kill_a_backend(pipeline)
                expected.update(await live)
                await eventually("it is refilled", lambda crash=crash: len(refills(pipeline, sink)) >= crash)
                await pipeline.wait_for(expected)
        finally:
            pipeline.close()


async def load(pipeline, rounds):
    expected = {}
    for number in range(rounds):
        expected.update(await asyncio.to_thread(produce, pipeline, agents=AGENTS[:50], value=str(number)))
        await asyncio.sleep(0.02)  # the pace
    return expected


async def kill_a_backend(pipeline):
    """kill -9: Postgres then ends all others too, and empties UNLOGGED tables as it recovers."""
    async with pipeline.connection() as connection:
        pid = await connection.fetchval(
            "select pid from pg_stat_activity where application_name = 'agent-metadata-sink' limit 1"
        )
        os.kill(pid, signal.SIGKILL)
        with pytest.raises((asyncpg.PostgresError, OSError)):
            await connection.execute("select pg_sleep(60)")


async def test_refill_by_hand_brings_back_what_was_deleted_and_moves_nothing_back(deploy):
    pipeline = await deploy(window_seconds=0.2)
    await pipeline.started("worker")
    sink = await pipeline.started("sink")
    expected = produce(pipeline)
    await pipeline.wait_for(expected)
    assert pipeline.stop(sink) == 0
    pair = (str(AGENTS[0]), "cpu")
    newer = datetime.now(UTC) + HOUR
    async with pipeline.connection() as connection:
        await connection.execute("delete from workspace_agent_metadata where workspace_agent_id <> $1", AGENTS[0])
        await connection.execute(
            "update workspace_agent_metadata set value = 'newer', collected_at = $1 where key = 'cpu'", newer
        )
    code, out, err = await pipeline.run("refill", "--json")
    assert (code, err) == (0, "")
    done = json.loads(out)
    assert (done["pairs"], done["changed"], done["already_newer"]) == (400, 398, 2)
    expected[pair] = ("newer", "", newer)
    assert await pipeline.table() == expected


async def test_only_one_refills_at_a_time(deploy, database_url):
    pipeline = await deploy()
    store = await Store.connect(database_url, connections=1, undeclared="insert", notify=False)
    async with store.epoch.refilling() as is_ours:
        assert is_ours
        code, out, err = await pipeline.run("refill")
    await store.close()
    assert (code, out) == (1, "")
    assert err.startswith("agent-metadata: another process is refilling the table")
    assert (await pipeline.run("refill"))[0] == 0


async def test_refill_without_tables_says_how_to_make_them(deploy):
    pipeline = await deploy()
    await execute(pipeline, "drop table agent_metadata_migrations")
    code, out, err = await pipeline.run("refill")
    assert (code, out) == (1, "")
    assert "run `agent-metadata db migrate`" in err


@pytest.fixture
async def store(database_url):
    connection = await asyncpg.connect(database_url)
    await migrate(connection)
    await connection.close()
    store = await Store.connect(database_url, connections=2, undeclared="insert", notify=False)
    yield store
    await store.close()


@pytest.fixture
async def connection(database_url):
    connection = await asyncpg.connect(database_url)
    yield connection
    await connection.close()


async def test_table_is_emptied_by_truncate_until_a_refill_has_ended_without_an_error(store, connection):
    assert not await store.epoch.is_emptied()
    await connection.execute("truncate workspace_agent_metadata")
    assert await store.epoch.is_emptied()
    with pytest.raises(ZeroDivisionError):
        async with store.epoch.refilling():
            _ = 1 / 0
    assert await store.epoch.is_emptied()
    async with store.epoch.refilling() as is_ours:
        assert is_ours
    assert not await store.epoch.is_emptied()


async def test_table_truncated_again_during_its_refill_is_not_taken_for_whole(store, connection):
    await connection.execute("truncate workspace_agent_metadata")
    async with store.epoch.refilling():
        await connection.execute("truncate workspace_agent_metadata")
    assert await store.epoch.is_emptied()


async def test_lost_connection_during_a_refill_leaves_the_table_emptied(store, connection):
    await connection.execute("truncate workspace_agent_metadata")
    with pytest.raises(ServiceUnavailable, match=r"Postgres (did not answer|is unavailable)"):
        async with store.epoch.refilling():
            await connection.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                " where application_name = 'agent-metadata-sink' and datname = current_database()"
            )
    assert await store.epoch.is_emptied()


async def test_crash_empties_an_unlogged_table_and_not_a_logged_one(store, connection):
    await connection.execute("truncate agent_metadata_epoch")  # all that a crash leaves of it
    assert not await store.epoch.is_emptied()
    await migrate(connection, unlogged=True)
    assert not await store.epoch.is_emptied()  # rewritten, and whole
    await connection.execute("truncate agent_metadata_epoch")
    assert await store.epoch.is_emptied()
