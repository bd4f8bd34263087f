"""The HTTP API over one LiveTable: routes, access, readiness, and the live page's files."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Final
from uuid import UUID

import msgspec
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException, Query, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.staticfiles import StaticFiles
from fastapi_offline import FastAPIOffline
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BeforeValidator, WithJsonSchema
from sse_starlette import EventSourceResponse
from starlette.types import Scope

from pipeline.core.report import agent_uuid
from pipeline.errors import DecodeError, PipelineError
from pipeline.monitoring.metrics import Freshness, ServeMetrics
from pipeline.serve.access import access_check
from pipeline.serve.live import LiveRow, LiveTable
from pipeline.serve.reports import Intake, ReportsRoute
from pipeline.serve.streams import (
    AgentMetadata,
    Body,
    EventStreams,
    ManyAgents,
    MetadataRow,
    Shape,
    many_agents,
    one_agent,
)

_MAX_AGENTS: Final = 500
_PAGE: Final = Path(__file__).with_name("page")
# Anybody may write values, keys and errors. The page makes text nodes of them; should it ever fail to, nothing runs.
_PAGE_HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}

# agent_id, key, value, error, collected_at, the agent's name
StoredRow = tuple[UUID, str, str, str, datetime, str | None]


def _agent_uuid(text: str) -> UUID:
    try:
        return UUID(agent_uuid(text))
    except DecodeError as error:
        raise ValueError(str(error)) from None


# An agent's UUID, in any spelling, or its name.
AgentId = Annotated[
    UUID,
    BeforeValidator(_agent_uuid),
    WithJsonSchema({"type": "string", "minLength": 1, "description": "the agent's UUID, or its name"}),
]
ReadRows = Callable[[Sequence[UUID]], Awaitable[Sequence[StoredRow]]]
LastEventId = Annotated[str | None, Header(alias="Last-Event-ID")]


class LiveServer:
    """The application and what it serves.

    `read(agent_ids)` asks Postgres, for requests that want what it has now; `table` follows the listener.
    `token` guards the agents' data. Without one, `is_local` means that only this machine's own names are answered:
    otherwise a foreign page whose name resolves to 127.0.0.1 (DNS rebinding) could read the data in its visitor's
    browser. `intake` takes reports; without one, POST /reports is off.
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
        intake: Intake | None = None,
    ) -> None:
        self._table = table
        self._read = read
        self._why_not_ready = why_not_ready
        self._metrics = ServeMetrics(registry)
        self._streams = EventStreams(table, self._metrics, freshness)
        self._reports = ReportsRoute(intake, self._metrics)
        self._registry = registry
        self.app = self._make_app(access_check(token, is_local=is_local), cors_origins)

    def close(self) -> None:
        """End all streams."""
        self._streams.close()

    def _make_app(self, check: Callable[..., Awaitable[None]] | None, cors_origins: Sequence[str]) -> FastAPI:
        app = FastAPIOffline(
            title="agent metadata",
            description="Agents' metadata as it is now, and as it changes; and reports of agents.",
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
        data = APIRouter(dependencies=[Depends(check)] if check else [])
        # `path`, so that a name may have slashes in it.
        data.get("/agents/{agent_id:path}/metadata", responses={200: {"model": AgentMetadata}})(self._get_one)
        data.get("/metadata", responses={200: {"model": ManyAgents}})(self._get_many)
        for path, watch in (
            ("/agents/{agent_id:path}/metadata/watch", self._watch_one),
            ("/metadata/watch", self._watch_many),
        ):
            data.get(path, response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})(watch)
        app.include_router(data)
        self._reports.add_to(app)
        app.get("/live", response_class=PlainTextResponse)(self._get_live)
        app.get("/ready", response_class=PlainTextResponse)(self._get_ready)
        app.get("/metrics", response_class=PlainTextResponse)(self._get_metrics)
        app.mount("/", _Page(directory=_PAGE, html=True))
        app.add_exception_handler(PipelineError, _unavailable)
        return app

    async def _get_one(self, agent_id: AgentId, request: Request) -> Response:
        """Read an agent's metadata from Postgres."""
        [agent] = await self._read_agents([agent_id])
        if not agent.metadata:
            raise HTTPException(404, f"agent {request.path_params['agent_id']} has no metadata")
        return _json(agent)

    async def _get_many(self, agent: Annotated[list[AgentId], Query(max_length=_MAX_AGENTS)]) -> Response:
        """Read several agents' metadata from Postgres in one query; an agent without metadata has an empty list."""
        return _json(ManyAgents(datetime.now(UTC), await self._read_agents(agent)))

    async def _read_agents(self, agent_ids: Iterable[UUID]) -> list[AgentMetadata]:
        agents = {agent_id: AgentMetadata(agent_id, None, []) for agent_id in agent_ids}
        rows = await self._read(list(agents))
        now = time.time()
        for agent_id, key, value, error, collected_at, name in rows:
            live = self._table.row(agent_id, key) or LiveRow(agent_id, key, collected_at)
            age = max(0.0, now - collected_at.timestamp())
            row = MetadataRow(key, value, error, collected_at, round(age, 3), live.stale_after_seconds)
            agents[agent_id].name = name
            agents[agent_id].metadata.append(row)
        return list(agents.values())

    async def _watch_one(self, agent_id: AgentId, last_event_id: LastEventId = None) -> Response:
        """Stream an agent's metadata: a `snapshot` event, then `changes` with the changed rows, at most once a second.

        The snapshot is repeated every 5 s, to keep ages current. With the Last-Event-ID of a stream that broke off, the
        first event has only what changed since, if this process still knows.
        """
        return self._stream([agent_id], last_event_id, partial(one_agent, agent_id))

    async def _watch_many(
        self,
        agent: Annotated[list[AgentId] | None, Query(max_length=_MAX_AGENTS)] = None,
        last_event_id: LastEventId = None,
    ) -> Response:
        """Stream the metadata of several agents, or of all if none is named, as for one agent.

        With all agents the snapshot is not repeated: every 5 s an event without agents says what time it is. A large
        snapshot is followed at once by `changes` with the rest of the rows.
        """
        return self._stream(dict.fromkeys(agent) if agent else None, last_event_id, many_agents)

    def _stream(self, agent_ids: Collection[UUID] | None, last_event_id: str | None, shape: Shape) -> Response:
        if not self._table.version and (why := self._why_not_ready()):
            raise HTTPException(503, why, {"Retry-After": "1"})
        # No pings: a stream is never silent for longer than 5 s.
        return EventSourceResponse(self._streams.open(agent_ids, last_event_id, shape), ping=0)

    async def _get_live(self) -> str:
        """Answer, which proves that the event loop runs."""
        return "ok\n"

    async def _get_ready(self, response: Response) -> str:
        """Answer 200, or 503 with the reason; streams then show the last known state."""
        why = self._why_not_ready()
        response.status_code = 503 if why else 200
        return f"{why or 'ok'}\n"

    async def _get_metrics(self) -> Response:
        """Return Prometheus metrics."""
        self._metrics.show_pairs(*self._table.count(time.time()), self._table.left_out_pairs)
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class _Page(StaticFiles):
    """The page's files, with headers that let nothing else run."""

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Scope, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(_PAGE_HEADERS)
        return response


def _json(body: Body) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json", headers={"Cache-Control": "no-store"})


async def _unavailable(_request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 503)
