"""5,000 event streams of one `agent-metadata serve`, for 60 s: memory, how late changes come, and that none is missed.

Every stream watches one of 1,000 agents with 10 keys each. All agents change once every 5 s, an eighth of them at a
time, as when eight partitions' windows close; a change's value is the time of its statement, right before the commit. A
stream also gets its snapshot again every 5 s. The clients are raw sockets in a process of their own, on the same
machine.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Any
from urllib.request import urlopen

import asyncpg
import uvloop

from bench import harness
from pipeline.core.notify import NOTIFY_CHANNEL, encode_agent_id_chunks
from pipeline.local import PackagedPostgres
from pipeline.local.process import free_port
from pipeline.postgres.migrations import migrate

CLIENTS, AGENTS, KEYS, PARTS = 5000, 1000, 10, 8
SECONDS, WINDOW_SECONDS = 60.0, 5.0
CONNECTING_AT_ONCE = 200
ARRIVAL_SECONDS = 30.0
_PACKAGES = ("fastapi", "sse-starlette", "uvicorn", "asyncpg", "msgspec", "uvloop")
_VALUE = re.compile(rb'"value":"([^"]*)"')

IDS = [uuid.UUID(agent_id) for agent_id in harness.agent_ids(AGENTS)]


class Client(asyncio.Protocol):
    """One stream; keeps its last value, and how late each change was."""

    def __init__(self, number: int, late: list[float]) -> None:
        self.agent_id = IDS[number % AGENTS]
        self.value = b""
        self.is_cut = False
        self._late = late
        self._text = b""
        self.began: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(b"GET /agents/%b/metadata/watch HTTP/1.1\r\nHost: x\r\n\r\n" % str(self.agent_id).encode())

    def data_received(self, data: bytes) -> None:
        now = time.time()
        self._text += data
        *events, self._text = self._text.split(b"\n\n")
        for event in events:
            value = _VALUE.search(event)
            assert value is not None, event
            if value[1] != self.value and self.value and b"event: changes" in event:
                self._late.append(now - float(value[1]))
            self.value = value[1]
        if events and not self.began.done():
            self.began.set_result(None)

    def connection_lost(self, _error: Exception | None) -> None:
        self.is_cut = True


async def clients(port: int) -> None:
    """The client process: connect, report that, and report what was seen for each line of stdin."""
    late: list[float] = []
    loop = asyncio.get_running_loop()
    made: list[Client] = []
    for start in range(0, CLIENTS, CONNECTING_AT_ONCE):
        group = [Client(number, late) for number in range(start, min(CLIENTS, start + CONNECTING_AT_ONCE))]
        await asyncio.gather(*(loop.create_connection(lambda c=client: c, "127.0.0.1", port) for client in group))
        await asyncio.gather(*(client.began for client in group))
        made += group
    print("connected", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        final = line.strip().encode()
        seen = {
            "streams": len(made),
            "cut": sum(client.is_cut for client in made),
            "without_final_value": sum(client.value != final for client in made),
            "changes": len(late),
            "late_seconds": percentiles(late),
        }
        print(json.dumps(seen), flush=True)


def percentiles(seconds: list[float]) -> dict[str, float]:
    if len(seconds) < 2:
        return {}
    cuts = statistics.quantiles(seconds, n=1000)
    return {"p50": round(cuts[499], 3), "p99": round(cuts[989], 3), "max": round(max(seconds), 3)}


async def change(connection: Any, agent_ids: list[uuid.UUID]) -> str:
    """Write one value to all pairs of some agents, and NOTIFY, as the sink does; return the value."""
    value = f"{time.time():.6f}"
    async with connection.transaction():
        await connection.execute(
            "update workspace_agent_metadata set value = $2, collected_at = $3 where workspace_agent_id = any($1)",
            *(agent_ids, value, datetime.now(UTC)),
        )
        for payload in encode_agent_id_chunks(agent_ids):
            await connection.execute("select pg_notify($1, $2)", NOTIFY_CHANNEL, payload)
    return value


def rss_mib(pid: int) -> float:
    with open(f"/proc/{pid}/status", encoding="utf-8") as lines:
        return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024, 1)


def cpu_seconds(pid: int) -> float:
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_ready(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/ready", timeout=2).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


async def measure(postgres: PackagedPostgres) -> dict[str, Any]:
    connection = await asyncpg.connect(postgres.database_url)
    await migrate(connection)
    pairs = [(agent_id, f"key{key:02}", "0") for agent_id in IDS for key in range(KEYS)]
    await connection.executemany(
        "insert into workspace_agent_metadata (workspace_agent_id, key, value) values ($1, $2, $3)", pairs
    )
    port = free_port()
    environment = {**os.environ, "DATABASE_URL": postgres.database_url, "AGENT_METADATA_SERVE_PORT": str(port)}
    server = subprocess.Popen(  # noqa: ASYNC220  # nothing else runs yet
        [sys.executable, "-m", "pipeline", "serve"], env=environment
    )
    watching = None
    try:
        wait_until_ready(port)
        idle_mib = rss_mib(server.pid)
        started = time.monotonic()
        watching = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.serve", "clients", str(port)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert watching.stdin is not None
        assert watching.stdout is not None
        assert await watching.stdout.readline() == b"connected\n"
        connected_seconds = time.monotonic() - started
        started, cpu = time.monotonic(), cpu_seconds(server.pid)
        peak_mib, turn = 0.0, 0
        while time.monotonic() - started < SECONDS:
            await change(connection, IDS[turn % PARTS :: PARTS])
            peak_mib = max(peak_mib, rss_mib(server.pid))
            turn += 1
            await asyncio.sleep(max(0.0, started + turn * WINDOW_SECONDS / PARTS - time.monotonic()))
        cpu_share = (cpu_seconds(server.pid) - cpu) / (time.monotonic() - started)
        final = await change(connection, IDS)
        deadline = time.monotonic() + ARRIVAL_SECONDS
        while True:
            watching.stdin.write(f"{final}\n".encode())
            seen: dict[str, Any] = json.loads(await watching.stdout.readline())
            if not seen["without_final_value"] or time.monotonic() > deadline:
                break
            await asyncio.sleep(0.5)
        connections = await connection.fetchval(
            "select count(*) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        )
    finally:
        if watching is not None:
            watching.kill()
            await watching.wait()
        server.terminate()
        server.wait(30)
        await connection.close()
    return {
        **seen,
        "database_connections": connections,
        "memory_mib": {"without_streams": idle_mib, "peak": peak_mib},
        "kib_a_stream": round((peak_mib - idle_mib) * 1024 / CLIENTS, 1),
        "cores_used": round(cpu_share, 2),
        "connecting_seconds": round(connected_seconds, 1),
    }


def main() -> None:
    # Both ends of all streams are on this machine; the server inherits the limit.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * CLIENTS), hard))
    if sys.argv[1:2] == ["clients"]:
        uvloop.run(clients(int(sys.argv[2])))
        return
    with PackagedPostgres() as postgres:
        figures = uvloop.run(measure(postgres))
        services = "PostgreSQL from packages"
    summary = {"benchmark": "serve", **harness.conditions(services, _PACKAGES), "note": __doc__, "figures": figures}
    harness.write("serve", summary)
    print(json.dumps(figures, indent=2))
    if figures["without_final_value"] or figures["cut"]:
        sys.exit("streams were cut, or missed the final value")


if __name__ == "__main__":
    main()
