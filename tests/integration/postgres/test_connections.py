"""Through PgBouncer in transaction mode: tables and sinks work, a listener that would receive nothing is refused."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import pytest

from pipeline.core.notify import NOTIFY_CHANNEL, encode_agent_id_chunks
from tests.support.debian_services import pgbouncer
from tests.support.deployment import DEADLINE_SECONDS, Deployment, eventually

pytestmark = pytest.mark.services

AGENT = UUID("0b7c1e1c-3a54-4be5-9f0e-2a8f7b1ac001")
ROW = (
    "insert into workspace_agent_metadata as held (workspace_agent_id, key, value) values ($1, 'k', $2)"
    " on conflict (workspace_agent_id, key) do update set value = excluded.value"
)


@pytest.fixture
def pool(database_url: str) -> Iterator[Any]:
    """Start a pooler: `pool("transaction")` returns its URL."""
    with ExitStack() as stack:

        def start(mode: str, **settings: str) -> str:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.chmod(0o755)
            return stack.enter_context(pgbouncer(folder, database_url, pool_mode=mode, **settings))

        yield start


def agent_metadata(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


async def test_migrate_through_a_pooler_leaves_no_lock_behind(pool, database_url):
    url = pool("transaction", default_pool_size="2")
    made = [agent_metadata("db", "migrate", DATABASE_URL=url) for _ in range(2)]
    assert [(done.returncode, done.stderr) for done in made] == [(0, ""), (0, "")]
    assert agent_metadata("db", "status", DATABASE_URL=url).returncode == 0
    connection = await asyncpg.connect(database_url)
    locks = "select count(*) from pg_locks where locktype = 'advisory'"
    assert await connection.fetchval(locks) == 0
    await connection.close()


async def test_two_sinks_write_through_one_pooler(pool, bootstrap_servers, database_url, tmp_path):
    url = pool("transaction", default_pool_size="2")
    deployed = Deployment(bootstrap_servers, database_url, tmp_path)
    try:
        await deployed.prepare()
        await deployed.started("worker")
        deployed.environment["DATABASE_URL"] = url
        sinks = [deployed.start("sink") for _ in range(2)]
        for sink in sinks:
            await eventually("a sink owns partitions", lambda sink=sink: deployed.logged(sink, "partitions_assigned"))
        assert deployed.logged(sinks[0], "database_is_pooled")
        started, expected = datetime.now(UTC), {}
        with deployed.producer() as producer:
            for number in range(2000):
                agent, now = UUID(int=number % 200), started + timedelta(milliseconds=number)
                producer.add(agent, ["k"], [str(number)], [""], now)
                expected[str(agent), "k"] = (str(number), "", now)
        await deployed.wait_for(expected)
        assert [deployed.stop(sink) for sink in sinks] == [0, 0]
        logged = "".join(map(deployed.log, sinks))
    finally:
        deployed.close()
    assert "Traceback" not in logged
    assert "prepared statement" not in logged


@pytest.mark.parametrize(("command", "in_turn"), [("watch", "0"), ("watch", "1"), ("serve", "0")])
def test_listening_through_a_pooler_in_transaction_mode_is_refused(pool, database_url, command, in_turn):
    assert agent_metadata("db", "migrate", DATABASE_URL=database_url).returncode == 0
    url = pool("transaction", server_round_robin=in_turn)
    done = agent_metadata(command, DATABASE_URL=url)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("agent-metadata: DATABASE_URL goes through a connection pooler in transaction mode")
    assert "set DATABASE_LISTEN_URL to the server itself" in line


def test_bridge_through_a_pooler_in_transaction_mode_is_refused(pool, database_url):
    done = agent_metadata("bridge", AGENT_METADATA_BRIDGE_DATABASE_URL=pool("transaction"), DATABASE_URL=database_url)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    variable = "AGENT_METADATA_BRIDGE_DATABASE_URL"
    assert line.startswith(f"agent-metadata: {variable} goes through a connection pooler in transaction mode")
    assert f"set {variable} to the server itself" in line


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_bridge_recognises_the_pipelines_own_table_behind_a_pooler(pool, database_url, mode):
    assert agent_metadata("db", "migrate", DATABASE_URL=database_url).returncode == 0
    done = agent_metadata("bridge", AGENT_METADATA_BRIDGE_DATABASE_URL=database_url, DATABASE_URL=pool(mode))
    assert (done.returncode, done.stdout) == (2, "")
    assert "lead to the same table" in done.stderr


@pytest.mark.parametrize("listens", ["directly", "through a pooler in session mode"])
async def test_watch_with_a_listen_url_hears_what_is_notified(pool, database_url, listens):
    assert agent_metadata("db", "migrate", DATABASE_URL=database_url).returncode == 0
    urls = {
        "DATABASE_URL": pool("transaction"),
        "DATABASE_LISTEN_URL": database_url if listens == "directly" else pool("session"),
    }
    watching = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pipeline", "watch", "--json"),
        env={**os.environ, **urls},
        stdout=asyncio.subprocess.PIPE,
    )
    connection = await asyncpg.connect(database_url)
    try:
        # The first row may come with the snapshot; the second comes by NOTIFY.
        for number in (1, 2):
            await connection.execute(ROW, AGENT, str(number))
            await connection.execute("select pg_notify($1, $2)", NOTIFY_CHANNEL, *encode_agent_id_chunks([AGENT]))
            change = json.loads(await asyncio.wait_for(watching.stdout.readline(), DEADLINE_SECONDS))
            assert change["value"] == str(number)
    finally:
        await connection.close()
        watching.terminate()
        await watching.communicate()
