"""`agent-metadata serve` as a process, against a real Postgres."""

import asyncio
import os
import signal
import subprocess
import sys
import uuid
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime

import pytest

from pipeline.core.notify import NOTIFY_CHANNEL, encode_agent_id
from pipeline.local.process import free_port
from tests.support.deployment import eventually
from tests.support.serving import get, watching

pytestmark = pytest.mark.services

A1, A2 = (uuid.UUID(int=number) for number in (1, 2))


class ServeProcess:
    def __init__(self, database_url, log_path, port, settings):
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path
        environment = {
            **os.environ,
            "DATABASE_URL": database_url,
            "AGENT_METADATA_SERVE_PORT": str(port),
            "AGENT_METADATA_LOG_FORMAT": "json",
            **settings,
        }
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", "serve"], env=environment, stdin=subprocess.DEVNULL, stderr=log
            )

    async def ready(self):
        async def is_ready():
            assert self.process.poll() is None, self.log_path.read_text()
            try:
                return (await get(self.url, "/ready"))[0] == 200
            except OSError:
                return False

        await eventually("serve is ready", is_ready)
        return self

    def stop(self, number=signal.SIGTERM):
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def serve(database_url, tmp_path):
    started = []

    def start(port=None, **settings):
        started.append(ServeProcess(database_url, tmp_path / "serve.log", port or free_port(), settings))
        return started[-1]

    yield start
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.wait()


async def change(connection, agent_id, key, value):
    async with connection.transaction():
        await connection.execute(
            "insert into workspace_agent_metadata (workspace_agent_id, key, value, collected_at) "
            "values ($1, $2, $3, $4) on conflict (workspace_agent_id, key) do update "
            "set value = excluded.value, collected_at = excluded.collected_at",
            *(agent_id, key, value, datetime.now(UTC)),
        )
        await connection.execute("select pg_notify($1, $2)", NOTIFY_CHANNEL, encode_agent_id(agent_id))


@asynccontextmanager
async def many_streams(url, count):
    async with AsyncExitStack() as stack:
        paths = [f"/agents/{(A1, A2)[number % 2]}/metadata/watch" for number in range(count)]
        yield [await stack.enter_async_context(watching(url, path)) for path in paths]


async def next_value(stream, value):
    while True:
        if (await stream.next()).values().get("k") == value:
            return


async def test_changes_reach_all_watchers_over_one_listening_connection(serve, connection):
    await change(connection, A1, "k", "old")
    server = await serve().ready()
    async with many_streams(server.url, 20) as streams:
        for stream in streams:
            await stream.next()
        await change(connection, A1, "k", "one")
        await change(connection, A2, "k", "two")
        for number, stream in enumerate(streams):
            await next_value(stream, ("one", "two")[number % 2])
        connections = await connection.fetchval(
            "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        )
        assert connections == 1
        assert (await get(server.url, f"/agents/{A2}/metadata"))[1]["metadata"][0]["value"] == "two"


async def test_pairs_beyond_the_most_that_are_held_are_left_out_and_said_once(serve, connection):
    agents = [uuid.UUID(int=number) for number in range(10)]
    for agent_id in agents[:5]:
        await change(connection, agent_id, "k", "snapshot")
    server = await serve(AGENT_METADATA_SERVE_MAX_PAIRS="3").ready()
    for agent_id in agents[5:]:
        await change(connection, agent_id, "k", "later")

    async def metrics():
        return (await get(server.url, "/metrics"))[1].splitlines()

    await eventually("it counts them", lambda: has(metrics, "agent_metadata_left_out_pairs 7.0"))
    assert await has(metrics, "agent_metadata_served_pairs 3.0")
    await change(connection, agents[0], "k", "held")
    async with watching(server.url, "/metadata/watch") as stream:
        while (event := await stream.next()).values().get(f"{agents[0]}:k") != "held":
            pass
    assert event.body["left_out_pairs"] == 7
    assert (await get(server.url, f"/agents/{agents[9]}/metadata"))[1]["metadata"][0]["value"] == "later"
    assert server.log_path.read_text().count('"pairs_left_out"') == 1


async def has(lines, line):
    return line in await lines()


async def test_watchers_get_what_changed_while_the_listener_was_cut_off(serve, connection):
    await change(connection, A1, "k", "old")
    server = await serve().ready()
    async with watching(server.url, f"/agents/{A1}/metadata/watch") as stream:
        await stream.next()
        await connection.execute(
            "select pg_terminate_backend(pid, 10000) from pg_stat_activity "
            "where datname = current_database() and pid <> pg_backend_pid()"
        )
        await change(connection, A1, "k", "missed")
        await next_value(stream, "missed")
        await change(connection, A1, "k", "live")
        await next_value(stream, "live")


async def test_stream_ends_with_its_process_and_starts_over_with_the_next(serve, connection):
    await change(connection, A1, "k", "old")
    port = free_port()
    server = await serve(port).ready()
    async with watching(server.url, f"/agents/{A1}/metadata/watch") as stream:
        seen = await stream.next()
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        assert await stream.ended()
        assert await stopping == 0
    await change(connection, A1, "k", "meanwhile")
    server = await serve(port).ready()
    async with watching(server.url, f"/agents/{A1}/metadata/watch", Last_Event_ID=seen.id) as stream:
        event = await stream.next()
    assert (event.name, event.values()) == ("snapshot", {"k": "meanwhile"})
    assert server.stop(signal.SIGINT) == 0
    assert '"level": "error"' not in server.log_path.read_text()


async def test_database_without_tables_is_refused_in_one_line(serve, database_url):
    server = serve()
    assert await asyncio.to_thread(server.process.wait, 30) == 1
    [line] = server.log_path.read_text().splitlines()
    assert "agent-metadata db migrate" in line


async def test_port_that_is_taken_is_refused_in_one_line(serve, connection):
    port = free_port()
    await serve(port).ready()
    second = serve(port)
    assert await asyncio.to_thread(second.process.wait, 30) == 2
    assert f"AGENT_METADATA_SERVE_PORT={port}" in second.log_path.read_text().splitlines()[-1]
