"""Wire a server of the API and the live page from settings."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any, Final
from uuid import UUID

import asyncpg
import structlog
from prometheus_client import CollectorRegistry

from pipeline.errors import ConfigError
from pipeline.postgres.connections import connected, listener, require_sessions
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.migrations import require_schema
from pipeline.postgres.pooling import statements_to_keep
from pipeline.postgres.store import CONNECT_TIMEOUT_SECONDS, read_rows
from pipeline.roles.process import on_stop_signals
from pipeline.serve.live import LiveTable
from pipeline.settings import Settings

# For requests that read Postgres; streams need none.
SERVE_CONNECTIONS: Final = 4

_log = structlog.get_logger(__name__)


async def run_serve(settings: Settings) -> None:
    """Serve the API and the live page until SIGTERM or SIGINT.

    Raises:
        ConfigError, ServiceUnavailable, SchemaMismatch: it could not start.
        PipelineError: Postgres refuses the listener for good.
    """
    try:
        from pipeline.serve.api import LiveServer
        from pipeline.serve.http import listen, serve
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed: pip install 'agent-metadata-pipeline[serve]' for `serve`"
        ) from error
    async with connected(settings) as connection:
        await require_schema(connection)
    await require_sessions(settings)
    table = LiveTable()
    registry = CollectorRegistry()
    rows = listener(settings, None, registry)
    database_url = settings.database_url.get_secret_value()
    async with translated_errors("connecting"):
        kept = await statements_to_keep(database_url, CONNECT_TIMEOUT_SECONDS)
    pool = asyncpg.create_pool(
        database_url,
        statement_cache_size=kept,
        min_size=0,
        max_size=SERVE_CONNECTIONS,
        timeout=CONNECT_TIMEOUT_SECONDS,
        command_timeout=CONNECT_TIMEOUT_SECONDS,
        server_settings={"application_name": "agent-metadata-serve"},
    )

    async def follow() -> None:
        async for change in rows.changes():
            table.change(*change)

    async def read(agent_ids: Sequence[UUID]) -> Sequence[Any]:
        async with translated_errors("reading metadata"), pool.acquire() as connection, connection.transaction():
            return await read_rows(connection, agent_ids)

    server = LiveServer(
        table=table,
        read=read,
        why_not_ready=lambda: None if rows.is_following else "Postgres is away; what was known last is shown",
        registry=registry,
        freshness=rows.freshness,
        token=settings.serve_token.get_secret_value() if settings.serve_token else None,
        is_local=_is_loopback(settings.serve_host),
        cors_origins=[origin.strip() for origin in settings.serve_cors_origins.split(",") if origin.strip()],
    )
    stop = asyncio.Event()
    on_stop_signals(stop.set)
    async with pool:
        listening = listen(settings.serve_host, settings.serve_port)
        following = asyncio.create_task(follow())
        following.add_done_callback(lambda _: stop.set())
        host, port = listening.getsockname()[:2]
        _log.info("serve_started", url=f"http://{host}:{port}/", token="asked for" if settings.serve_token else "none")
        await serve(server, listening, stop)
        if following.done():
            following.result()
        following.cancel()
    _log.info("serve_stopped")


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
