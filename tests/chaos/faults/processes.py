"""Faults of the pipeline's own processes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import psutil

from tests.chaos.faults.postgres import SINK_SESSIONS
from tests.chaos.harness import START_SECONDS, Action, Fault, Run
from tests.chaos.member import Member
from tests.support.deployment import eventually


def kill(role: str) -> Action:
    """kill -9 of the oldest, once it owns partitions; its supervisor starts it again."""

    async def act(run: Run) -> None:
        member = run.active(role)[0]
        await eventually(f"{role} owns partitions", member.is_ready, START_SECONDS)
        member.kill()

    return act


def frozen(role: str) -> Fault:
    """SIGSTOP of the oldest; SIGCONT in the end."""

    @asynccontextmanager
    async def fault(run: Run) -> AsyncIterator[None]:
        member = run.active(role)[0]
        member.freeze()
        try:
            yield
        finally:
            member.thaw()

    return fault


def restart_each(role: str) -> Action:
    """Restart all of a role one after the other, each once the one before it has its partitions again."""

    async def act(run: Run) -> None:
        for member in run.active(role):
            await member.restart()
            await eventually(f"{role} owns partitions again", member.is_ready, START_SECONDS)

    return act


def upgrade_each(role: str, module: Sequence[str] | None = None) -> Action:
    """Replace all of a role, one after the other, by today's version, or by what is run as `module`."""

    async def act(run: Run) -> None:
        for member in run.active(role):
            await member.upgrade(module)
            await eventually(f"{role} owns partitions again", member.is_ready, START_SECONDS)

    return act


def join(role: str) -> Action:
    """Start one more."""

    async def act(run: Run) -> None:
        run.join(role)

    return act


def leave(role: str) -> Action:
    """End the newest for good, by SIGTERM."""

    async def act(run: Run) -> None:
        await run.active(role)[-1].leave()

    return act


def replay(source: str) -> Action:
    """Replay a whole topic; Kafka and Postgres must be up."""

    async def act(run: Run) -> None:
        process = run.start("replay", "--from", "1d ago", "--source", source)
        await eventually("the replay ends", lambda: process.poll() is not None, START_SECONDS)
        assert process.returncode == 0, run.deployment.log(process)

    return act


async def kill_sink_in_transaction(run: Run) -> None:
    """kill -9 of a sink with rows written and nothing committed."""
    async with _sink_in_transaction(run) as sink:
        sink.kill()


async def kill_sink_in_transaction_and_worker(run: Run) -> None:
    """kill -9 of both."""
    async with _sink_in_transaction(run) as sink:
        sink.kill()
        run.active("worker")[0].kill()


@asynccontextmanager
async def sink_frozen_in_transaction(run: Run) -> AsyncIterator[None]:
    """SIGSTOP of a sink with rows written and nothing committed; SIGCONT in the end."""
    async with _sink_in_transaction(run) as sink:
        sink.freeze()
    try:
        yield
    finally:
        sink.thaw()


@asynccontextmanager
async def _sink_in_transaction(run: Run) -> AsyncIterator[Member]:
    """A sink in the middle of a transaction: progress locked, rows written, nothing committed."""
    last_agent = max(run.load.lasting)
    async with run.connection() as connection, connection.transaction():
        count = "select count(*) from workspace_agent_metadata where workspace_agent_id = $1"
        await eventually("its row is there", lambda: connection.fetchval(count, last_agent))
        # A sink locks rows in the order of agents: it stops at this one, with those before it written.
        await connection.execute(
            "select from workspace_agent_metadata where workspace_agent_id = $1 for update", last_agent
        )
        yield await eventually("a sink waits in its transaction", lambda: _waiting_sink(run))


async def _waiting_sink(run: Run) -> Member | None:
    async with run.connection() as connection:
        port = await connection.fetchval(
            f"select client_port from pg_stat_activity where {SINK_SESSIONS} and wait_event_type = 'Lock' limit 1"
        )
    for sink in run.active("sink"):
        sockets: Any = psutil.Process(sink.process.pid).net_connections() if port else ()
        if any(socket.laddr.port == port for socket in sockets):
            return sink
    return None
