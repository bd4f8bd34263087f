"""A LiveServer in the test's own event loop, and a client of its event streams."""

from __future__ import annotations

import asyncio
import io
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import aiohttp
from prometheus_client import CollectorRegistry

from pipeline.core.report import agent_uuid
from pipeline.monitoring.metrics import Freshness
from pipeline.serve.api import LiveServer
from pipeline.serve.http import listen, serve
from pipeline.serve.live import LiveTable

WAIT_SECONDS = 30.0


class Event(NamedTuple):
    name: str
    id: str
    body: Any

    def values(self) -> dict[str, str]:
        """{key: value} of an agent's event, {agent:key: value} of an event of many."""
        if "metadata" in self.body:
            return {row["key"]: row["value"] for row in self.body["metadata"]}
        return {
            f"{agent['agent_id']}:{row['key']}": row["value"]
            for agent in self.body["agents"]
            for row in agent["metadata"]
        }


class Serving:
    """A server whose table the test fills itself."""

    def __init__(self, *, port: int = 0, max_pairs: int = 1_000_000, **options: Any) -> None:
        self.table = LiveTable(max_pairs)
        self.stored: list[tuple[Any, ...]] = []
        self.reads: list[list[uuid.UUID]] = []
        self.why_not_ready: str | None = None
        self._listening = listen("127.0.0.1", port)
        self.port = self._listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._stop = asyncio.Event()
        registry = CollectorRegistry()
        self.server = LiveServer(
            table=self.table,
            read=self._read,
            why_not_ready=lambda: self.why_not_ready,
            registry=registry,
            freshness=Freshness(registry),
            **options,
        )
        self._serving = asyncio.create_task(serve(self.server, self._listening, self._stop))

    async def _read(self, agent_ids: Any) -> Any:
        self.reads.append(list(agent_ids))
        return [(*row[:5], row[5] if row[5:] else None) for row in self.stored if row[0] in agent_ids]

    def change(self, agent: uuid.UUID | str, key: str, value: str, error: str = "", *, ago: float = 0.0) -> None:
        agent_id, name = (agent, None) if isinstance(agent, uuid.UUID) else (uuid.UUID(agent_uuid(agent)), agent)
        collected_at = datetime.now(UTC) - timedelta(seconds=ago)
        self.table.change(agent_id, key, value, error, collected_at, time.time(), name)

    async def stop(self) -> None:
        self._stop.set()
        await self._serving


@asynccontextmanager
async def serving(**options: Any) -> AsyncIterator[Serving]:
    server = Serving(**options)
    try:
        yield server
    finally:
        await server.stop()


class Stream:
    """An open event stream."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> Event:
        async with asyncio.timeout(WAIT_SECONDS):
            fields = {}
            while line := (await self.response.content.readline()).rstrip(b"\n"):
                name, _, value = line.decode().partition(": ")
                fields[name] = value
            assert fields, "the stream ended"
            return Event(fields["event"], fields["id"], json.loads(fields["data"]))

    async def ended(self) -> bool:
        async with asyncio.timeout(WAIT_SECONDS):
            with suppress(aiohttp.ClientError):
                while await self.response.content.read(65536):
                    pass
            return True


@asynccontextmanager
async def watching(url: str, path: str, **headers: str) -> AsyncIterator[Stream]:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    timeout = aiohttp.ClientTimeout(total=None)
    async with (
        aiohttp.ClientSession(timeout=timeout, read_bufsize=2**20) as session,
        session.get(url + path, headers=given) as response,
    ):
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        yield Stream(response)


async def get(url: str, path: str, **headers: str) -> tuple[int, Any, aiohttp.ClientResponse]:
    async with aiohttp.ClientSession() as session, session.get(url + path, headers=headers) as response:
        is_json = response.content_type == "application/json"
        return response.status, await (response.json() if is_json else response.text()), response


async def post_reports(
    url: str, body: Any, token: str | None, *, kind: str = "application/json", **headers: str
) -> tuple[int, Any, Any]:
    """Return status, answer and headers; `body` is what JSON is made of, bytes, or an iterator of bytes."""
    given = {"Content-Type": kind, **({"Authorization": f"Bearer {token}"} if token else {})}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    data = json.dumps(body).encode() if isinstance(body, dict | list) else body
    data = io.BytesIO(data) if isinstance(data, bytes) else data
    async with aiohttp.ClientSession() as session, session.post(url + "/reports", data=data, headers=given) as response:
        return response.status, await response.json(), response.headers
