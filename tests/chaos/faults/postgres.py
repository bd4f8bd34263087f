"""Faults of Postgres: its server, its sessions, its space."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from tests.chaos.harness import Run
from tests.chaos.load import POISON
from tests.support.deployment import eventually

SINK_SESSIONS = "application_name = 'agent-metadata-sink' and datname = current_database()"
LISTENER_SESSIONS = "application_name = '' and backend_type = 'client backend' and datname = current_database()"


async def restart(run: Run) -> None:
    await asyncio.to_thread(run.services.postgres.restart)


@asynccontextmanager
async def crashed(run: Run) -> AsyncIterator[None]:
    """Killed, and started in the end."""
    await asyncio.to_thread(run.services.postgres.kill)
    try:
        yield
    finally:
        await asyncio.to_thread(run.services.postgres.start)


@asynccontextmanager
async def stopped(run: Run) -> AsyncIterator[None]:
    """Shut down, and started in the end."""
    await asyncio.to_thread(run.services.postgres.stop)
    try:
        yield
    finally:
        await asyncio.to_thread(run.services.postgres.start)


async def kill_backend(run: Run) -> None:
    """kill -9 of a process that serves a sink: Postgres ends all others too and recovers as from a crash."""
    async with run.connection() as connection:
        pid = await eventually(
            "a sink is connected",
            lambda: connection.fetchval(f"select pid from pg_stat_activity where {SINK_SESSIONS} limit 1"),
        )
    os.kill(pid, signal.SIGKILL)


async def end_listener_sessions(run: Run) -> None:
    async with run.connection() as connection:
        await _end_sessions(connection, LISTENER_SESSIONS)


async def end_session_of_frozen_sink(run: Run) -> None:
    """As Postgres does once the host of a client no longer answers; another sink goes on."""
    async with run.connection() as connection:
        await _end_sessions(connection, f"{SINK_SESSIONS} and state like 'idle in transaction%'")


async def _end_sessions(connection: Any, condition: str) -> None:
    await connection.execute(f"select pg_terminate_backend(pid) from pg_stat_activity where {condition}")


@asynccontextmanager
async def no_free_connections(run: Run) -> AsyncIterator[None]:
    """Leave no connections for a sink, and end those that it has."""
    taken: list[Any] = []
    refusals = 0
    try:
        async with run.connection() as connection:
            while refusals < 5:
                await connection.execute(
                    f"select pg_terminate_backend(pid) from pg_stat_activity where {SINK_SESSIONS}"
                )
                try:
                    taken.append(await _unrelated_connection(run))
                    refusals = 0
                except asyncpg.TooManyConnectionsError:
                    refusals += 1
                    await asyncio.sleep(0.05)
        yield
    finally:
        for connection in taken:
            connection.terminate()


async def _unrelated_connection(run: Run) -> Any:
    url = run.services.postgres.database_url
    return await asyncpg.connect(url, server_settings={"application_name": "chaos-holding"})


@asynccontextmanager
async def read_only(run: Run) -> AsyncIterator[None]:
    """Refuse writes, as a standby does, in open sessions too."""
    await _set_read_only(run, "on")
    try:
        yield
    finally:
        await _set_read_only(run, "off")


async def _set_read_only(run: Run, value: str) -> None:
    async with run.server() as server:
        await server.execute(f"alter system set default_transaction_read_only = {value}")
        await server.execute("select pg_reload_conf()")


@asynccontextmanager
async def small_notify_queue(run: Run) -> AsyncIterator[str]:
    """The smallest NOTIFY queue that Postgres can have: half a megabyte."""
    async with run.server() as server:
        await server.execute("alter system set max_notify_queue_pages = 64")
    await restart(run)
    try:
        yield ""
    finally:
        async with run.server() as server:
            await server.execute("alter system reset all")
        await restart(run)


@asynccontextmanager
async def full_notify_queue(run: Run) -> AsyncIterator[None]:
    """A listener idles in a transaction, and others send so much that the queue is full."""
    idle = await asyncpg.connect(run.deployment.environment["DATABASE_URL"])
    try:
        await idle.execute("listen chaos")
        await idle.execute("begin")
        await idle.execute("select 1")
        async with run.connection() as connection:
            with suppress(asyncpg.ProgramLimitExceededError):
                while True:
                    await connection.execute("select pg_notify('chaos', repeat('x', 7000))")
        yield
    finally:
        idle.terminate()


def why_no_small_disk() -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=True, capture_output=True)
            subprocess.run(["umount", folder], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return "a small disk can't be mounted here: that needs root"
    return None


@asynccontextmanager
async def small_disk(run: Run) -> AsyncIterator[str]:
    """A disk of 40 MB for the database."""
    disk = Path(tempfile.mkdtemp(prefix="chaos-disk-"))
    await _command("mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "none", str(disk))
    try:
        owner = psutil.Process(run.services.postgres.pid)
        os.chown(disk, owner.uids().effective, owner.gids().effective)
        name = f"small_{uuid.uuid4().hex[:8]}"
        async with run.server() as server:
            await server.execute(f"create tablespace {name} location '{disk}'")
        try:
            yield f"tablespace {name}"
        finally:
            async with run.server() as server:
                await server.execute(f"drop tablespace {name}")
    finally:
        await _command("umount", str(disk))
        await _command("rmdir", str(disk))


@asynccontextmanager
async def full_disk(run: Run) -> AsyncIterator[None]:
    """Fill the disk that `small_disk` made for the database."""
    async with run.connection() as connection:
        disk = await connection.fetchval(
            "select pg_tablespace_location(dattablespace) from pg_database where datname = current_database()"
        )
    ballast = Path(disk, "ballast")
    try:
        await asyncio.to_thread(_fill_disk, ballast)
        yield
    finally:
        await asyncio.to_thread(ballast.unlink)


def _fill_disk(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(8192)):
            pass


async def _command(*words: str) -> None:
    await asyncio.to_thread(subprocess.run, words, check=True, capture_output=True)


async def refuse_poison(run: Run) -> None:
    """Have Postgres refuse a value that the pipeline accepts."""
    async with run.connection() as connection:
        await connection.execute(f"alter table workspace_agent_metadata add check (value not like '% {POISON}')")
