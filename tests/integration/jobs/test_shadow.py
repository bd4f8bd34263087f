"""The command `agent-metadata shadow diff` on a real Postgres."""

import json
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest

from pipeline.postgres.migrations import migrate

pytestmark = pytest.mark.services

AGENTS = [uuid.UUID(int=number) for number in range(1, 7)]
OLD = datetime.now(UTC) - timedelta(hours=1)


@pytest.fixture
async def live(database_url):
    connection = await asyncpg.connect(database_url)
    await migrate(connection)
    await connection.execute('create schema "Shadow"')
    yield connection
    await connection.close()


@pytest.fixture
async def shadow(live, database_url):
    connection = await asyncpg.connect(database_url, server_settings={"search_path": '"Shadow"'})
    await migrate(connection)
    yield connection
    await connection.close()


def diff(url, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "pipeline", "shadow", "diff", *arguments],
        env={"DATABASE_URL": url, "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )


def in_shadow(database_url):
    return f"{database_url}?search_path=%22Shadow%22"


async def write(connection, agent_id, value, at=OLD):
    await connection.execute(
        "insert into workspace_agent_metadata (workspace_agent_id, key, value, collected_at)"
        " values ($1, 'cpu', $2, $3)",
        agent_id,
        value,
        at,
    )


async def test_diff_counts_what_agrees_and_names_what_does_not(live, shadow, database_url):
    await write(live, AGENTS[0], "same")
    await write(shadow, AGENTS[0], "same", OLD - timedelta(seconds=1))  # times are not compared
    await write(live, AGENTS[1], "coder's")
    await write(shadow, AGENTS[1], "ours\x1b[2J")
    await write(live, AGENTS[2], "missing")
    await write(shadow, AGENTS[3], "undeclared")
    await write(live, AGENTS[4], "just now", datetime.now(UTC))
    await write(live, AGENTS[5], "the same already", datetime.now(UTC))
    await write(shadow, AGENTS[5], "the same already", datetime.now(UTC))
    done = diff(in_shadow(database_url), "--json", "--settle", "600")
    found = json.loads(done.stdout)
    counts = {name: found[name] for name in ("same", "different", "only_live", "only_shadow", "unsettled")}
    assert counts == {"same": 2, "different": 1, "only_live": 1, "only_shadow": 1, "unsettled": 1}
    assert (done.returncode, done.stderr) == (1, "")
    assert [pair["agent_id"] for pair in found["pairs"]] == [str(AGENTS[1]), str(AGENTS[2])]
    shown = diff(in_shadow(database_url), "--settle", "600").stdout
    assert f"{AGENTS[1]} 'cpu': live \"coder's\", shadow 'ours\\x1b[2J'" in shown.splitlines()


async def test_diff_of_equal_tables_exits_with_0_and_forgives_declared_pairs(live, shadow, database_url):
    await write(live, AGENTS[0], "same")
    await write(shadow, AGENTS[0], "same")
    await write(live, AGENTS[1], "", datetime.min.replace(tzinfo=UTC))
    done = diff(in_shadow(database_url))
    assert (done.returncode, done.stderr) == (0, "")


async def test_wrong_tables_are_refused_in_one_line(live, database_url):
    same = diff(database_url)
    assert (same.returncode, same.stdout) == (2, "")
    assert same.stderr.startswith("agent-metadata: DATABASE_URL points to the table of public itself")
    none = diff(database_url, "--live", "nonesuch; drop table x")
    assert (none.returncode, none.stdout) == (2, "")
    assert "has no workspace_agent_metadata" in none.stderr
    empty = diff(in_shadow(database_url))
    assert (empty.returncode, empty.stdout) == (1, "")
    assert "run `agent-metadata db migrate`" in empty.stderr
    assert [len(done.stderr.splitlines()) for done in (same, none, empty)] == [1, 1, 1]
