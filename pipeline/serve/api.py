"""The HTTP API, the event streams and the live page, over one LiveTable; one event loop, one process."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID

import msgspec
import uvicorn
from fastapi import Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from sse_starlette import EventSourceResponse

from pipeline.errors import ConfigError, PipelineError
from pipeline.monitoring.metrics import Freshness, ServeMetrics
from pipeline.serve.live import LiveRow, LiveTable, Watcher

# Source: coder's workspace page, which sends changes at most once a second and everything again after five.
_EVENT_SECONDS: Final = 1.0
_RESEND_SECONDS: Final = 5.0
# Most rows in an event: with values at their limit some 4 MB, usually 200 kB.
_EVENT_ROWS: Final = 1000
_MOST_AGENTS: Final = 500
_LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")
# A client that takes nothing for so long is cut off by the kernel; until then it holds an event and this buffer.
_STALLED_SECONDS: Final = 20
_SEND_BUFFER_BYTES: Final = 256 * 1024
_BACKLOG: Final = 4096
_CLOSE_SECONDS: Final = 5
_PAGE: Final = Path(__file__).with_name("page")
# Values, keys and errors are anybody's text. The page makes text nodes of them; did it ever fail to, nothing would run.
_PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

ReadRows = Callable[[Sequence[UUID]], Awaitable[Sequence[Any]]]


@dataclass(slots=True)
class MetadataRow:
    """A pair's row as it is now."""

    key: str
    value: str
    error: str
    collected_at: datetime
    age_seconds: float
    stale_after_seconds: float
    """The age from which the pair counts as stale: three of its usual intervals."""


@dataclass(slots=True)
class AgentMetadata:
    """All rows of one agent, or those of them that changed."""

    agent_id: UUID
    metadata: list[MetadataRow]


@dataclass(slots=True)
class ManyAgents:
    """Several agents at one time."""

    now: datetime
    agents: list[AgentMetadata]


class LiveServer:
    """The application and what it serves from.

    `read(agent_ids)` is the store's, for requests that want what Postgres has now; `table` follows the listener.
    `is_local`: only this machine's own names are answered where there is no token. A foreign page, whose name leads
    to 127.0.0.1 (DNS rebinding), could read agents' metadata in its visitor's browser otherwise.
    """

    def __init__(
        self,
        *,
        table: LiveTable,
        read: ReadRows,
        why_not_ready: Callable[[], str | None],
        registry: CollectorRegistry,
        freshness: Freshness,
        token: str | None = None,
        cors_origins: Sequence[str] = (),
        is_local: bool = False,
    ) -> None:
        self._table = table
        self._read = read
        self._why_not_ready = why_not_ready
        self._metrics = ServeMetrics(registry)
        self._freshness = freshness
        self._registry = registry
        self._token = token
        self._is_local = is_local
        # Versions count within this process: an event id of another one means a fresh start.
        self._run_id = secrets.token_hex(4)
        self._is_closing = False
        self.app = self._make_app(cors_origins)

    def close(self) -> None:
        """End all streams; their clients will come back to the next process."""
        self._is_closing = True
        self._table.wake_all()

    def _make_app(self, cors_origins: Sequence[str]) -> FastAPI:
        app = FastAPIOffline(
            title="agent metadata",
            description="Agents' metadata as it is now, and as it changes.",
            version=version("agent-metadata-pipeline"),
            redoc_url=None,
        )
        if cors_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=list(cors_origins),
                allow_methods=["GET"],
                allow_headers=["Authorization", "Last-Event-ID"],
            )
        guard = self._bearer() if self._token else _require_local_name if self._is_local else None
        guarded: dict[str, Any] = {"dependencies": [Depends(guard)] if guard else []}
        many: dict[str, Any] = {"responses": {200: {"model": ManyAgents}}, **guarded}
        one: dict[str, Any] = {"responses": {200: {"model": AgentMetadata}}, **guarded}
        stream: dict[str, Any] = {"responses": {200: {"content": {"text/event-stream": {}}}}, **guarded}
        app.get("/agents/{agent_id}/metadata", **one)(self._get_one)
        app.get("/metadata", **many)(self._get_many)
        app.get("/agents/{agent_id}/metadata/watch", response_class=Response, **stream)(self._watch_one)
        app.get("/metadata/watch", response_class=Response, **stream)(self._watch_many)
        app.get("/live", response_class=PlainTextResponse)(self._get_live)
        app.get("/ready", response_class=PlainTextResponse)(self._get_ready)
        app.get("/metrics", response_class=PlainTextResponse)(self._get_metrics)
        app.mount("/", _Page(directory=_PAGE, html=True))
        app.add_exception_handler(PipelineError, _unavailable)
        return app

    def _bearer(self) -> Callable[..., Awaitable[None]]:
        expected = (self._token or "").encode()

        async def check(
            given: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
        ) -> None:
            if given is None or not secrets.compare_digest(given.credentials.encode(), expected):
                raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

        return check

    async def _get_one(self, agent_id: UUID) -> Response:
        """Read an agent's metadata from Postgres."""
        [agent] = await self._read_agents([agent_id])
        if not agent.metadata:
            raise HTTPException(404, f"agent {agent_id} has no metadata")
        return _json(agent)

    async def _get_many(self, agent: Annotated[list[UUID], Query(max_length=_MOST_AGENTS)]) -> Response:
        """Read several agents' metadata from Postgres in one query; an agent without any has an empty list."""
        return _json(ManyAgents(datetime.now(UTC), await self._read_agents(agent)))

    async def _read_agents(self, agent_ids: Iterable[UUID]) -> list[AgentMetadata]:
        agents = {agent_id: AgentMetadata(agent_id, []) for agent_id in agent_ids}
        rows = await self._read(list(agents))
        now = time.time()
        for agent_id, key, value, error, collected_at in rows:
            live = self._table.row(agent_id, key) or LiveRow(agent_id, key, collected_at)
            age = max(0.0, now - collected_at.timestamp())
            row = MetadataRow(key, value, error, collected_at, round(age, 3), live.stale_after_seconds)
            agents[agent_id].metadata.append(row)
        return list(agents.values())

    async def _watch_one(
        self, agent_id: UUID, last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None
    ) -> Response:
        """Stream an agent's metadata: a `snapshot` event, then `changes` at most once a second, with only those rows.

        Every 5 s the snapshot is sent again, so that ages stay true. With Last-Event-ID of a stream that was cut,
        the first event has only what changed since, if this process still knows.
        """
        return self._stream([agent_id], last_event_id, lambda rows: AgentMetadata(agent_id, list(_shown(rows))))

    async def _watch_many(
        self,
        agent: Annotated[list[UUID] | None, Query(max_length=_MOST_AGENTS)] = None,
        last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None,
    ) -> Response:
        """Stream several agents' metadata, or everyone's if none is named, like one agent's.

        Everyone's is not sent again: every 5 s an event without agents says what time it is. Its snapshot may be
        followed by `changes` at once, with the rest of the rows.
        """
        return self._stream(dict.fromkeys(agent) if agent else None, last_event_id, _grouped)

    def _stream(
        self, agent_ids: Collection[UUID] | None, last_event_id: str | None, body: Callable[[list[LiveRow]], Any]
    ) -> Response:
        if not self._table.version and (why := self._why_not_ready()):
            raise HTTPException(503, why, {"Retry-After": "1"})
        events = self._events(agent_ids, self._known_version(last_event_id), body)
        # No pings: the stream itself never stays silent for longer than 5 s.
        return EventSourceResponse(events, ping=0)

    def _known_version(self, event_id: str | None) -> int:
        """Return the version that an event id stands for; 0, for a snapshot, if it is not one of this process."""
        run_id, _, number = (event_id or "").partition("-")
        is_ours = run_id == self._run_id and number.isdecimal() and len(number) < 19
        return min(int(number), self._table.version) if is_ours else 0

    async def _events(
        self, agent_ids: Collection[UUID] | None, since: int, body: Callable[[list[LiveRow]], Any]
    ) -> AsyncIterator[bytes]:
        loop = asyncio.get_running_loop()
        # Everyone's rows are too many to repeat; whoever watches them reckons ages from `now`.
        is_repeating = agent_ids is not None
        name = b"changes" if since else b"snapshot"
        resend_at = loop.time() + _RESEND_SECONDS
        took_seconds = 0.0
        watcher = self._table.watch(agent_ids, since)
        self._metrics.watchers.inc()
        try:
            while not self._is_closing:
                for event_id, rows in self._parts(watcher):
                    if name == b"changes" and rows and rows[0].notified_at:
                        self._freshness.observe("sent", collected_at=rows[0].collected_at.timestamp(), at=time.time())
                    sending_at = loop.time()
                    try:
                        yield _event(name, event_id, body(rows))
                    finally:
                        took_seconds = loop.time() - sending_at
                    name = b"changes"
                sent_at = loop.time()
                if not is_repeating or sent_at >= resend_at:
                    resend_at = sent_at + _RESEND_SECONDS
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(resend_at):
                        await watcher.changed.wait()
                await asyncio.sleep(max(0.0, sent_at + _EVENT_SECONDS - loop.time()))
                if is_repeating and loop.time() >= resend_at:
                    watcher.rewind()
                    name = b"snapshot"
        finally:
            if took_seconds > _EVENT_SECONDS:  # the last event did not get through
                self._metrics.dropped_watchers.inc()
            self._metrics.watchers.dec()
            self._table.unwatch(watcher)

    def _parts(self, watcher: Watcher) -> Iterator[tuple[str, list[LiveRow]]]:
        """Cut what a watcher has not seen into events of at most 1,000 rows; one without rows if there is nothing.

        An event's id is the version of its last row: a client that is cut between two parts resumes after the first.
        """
        rows = watcher.take()
        for start in range(0, max(1, len(rows)), _EVENT_ROWS):
            part = rows[start : start + _EVENT_ROWS]
            is_last = start + _EVENT_ROWS >= len(rows)
            yield f"{self._run_id}-{watcher.seen if is_last else part[-1][0]}", [row for _, row in part]

    async def _get_live(self) -> str:
        """Answer, which shows that the event loop turns."""
        return "ok\n"

    async def _get_ready(self, response: Response) -> str:
        """Answer 200, or 503 with what is amiss; streams then show what was known last."""
        why = self._why_not_ready()
        response.status_code = 503 if why else 200
        return f"{why or 'ok'}\n"

    async def _get_metrics(self) -> Response:
        """Return Prometheus metrics."""
        self._metrics.show_pairs(*self._table.count(time.time()))
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


async def _require_local_name(request: Request) -> None:
    if request.url.hostname not in _LOCAL_NAMES:
        names = ", ".join(_LOCAL_NAMES)
        raise HTTPException(403, f"without AGENT_METADATA_SERVE_TOKEN only these names are answered here: {names}")


class _Page(StaticFiles):
    """The page's files, with headers that let nothing else run."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(_PAGE_HEADERS)
        return response


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the role."""
        yield


async def serve(server: LiveServer, listening: socket.socket, stop: asyncio.Event) -> None:
    """Serve on a socket of `listen` until `stop` is set; then end all streams, and wait for requests for up to 5 s."""
    config = uvicorn.Config(
        server.app,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=_BACKLOG,
        timeout_graceful_shutdown=_CLOSE_SECONDS,
    )
    http = _Server(config)
    serving = asyncio.create_task(http.serve(sockets=[listening]))
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait([serving, waiting], return_when=asyncio.FIRST_COMPLETED)
    finally:
        waiting.cancel()
        server.close()
        http.should_exit = True
        await serving


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket; a port of 0 is any free one.

    Raises:
        ConfigError: the address can't be had.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"AGENT_METADATA_SERVE_HOST={host} and AGENT_METADATA_SERVE_PORT={port} can't be served: {error.strerror}"
        ) from error
    # Accepted sockets inherit both: what a client that doesn't read can cost, and for how long.
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_SECONDS * 1000)
    return listening


def _shown(rows: Iterable[LiveRow]) -> Iterator[MetadataRow]:
    now = time.time()
    for row in rows:
        age = max(0.0, round(now - row.collected_at.timestamp(), 3))
        yield MetadataRow(row.key, row.value, row.error, row.collected_at, age, row.stale_after_seconds)


def _grouped(rows: Sequence[LiveRow]) -> ManyAgents:
    agents: dict[UUID, AgentMetadata] = {}
    for row, shown in zip(rows, _shown(rows), strict=True):
        agents.setdefault(row.agent_id, AgentMetadata(row.agent_id, [])).metadata.append(shown)
    return ManyAgents(datetime.now(UTC), list(agents.values()))


def _event(name: bytes, event_id: str, body: Any) -> bytes:
    # JSON has no line breaks of its own, so one data line is enough.
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (event_id.encode(), name, msgspec.json.encode(body))


def _json(body: Any) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json", headers={"Cache-Control": "no-store"})


async def _unavailable(_request: Any, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 503)
