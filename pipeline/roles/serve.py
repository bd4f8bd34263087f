"""The server's process: a listener that keeps the rows in memory, and the API and live page that show them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import ip_address
from typing import Final
from uuid import UUID

import asyncpg
import structlog
from prometheus_client import CollectorRegistry

from pipeline.errors import ConfigError, PipelineError, ServiceUnavailable
from pipeline.kafka.publisher import PARTITIONER, Publisher
from pipeline.kafka.topics import require_topics
from pipeline.listener import MetadataListener
from pipeline.postgres.connections import CONNECT_TIMEOUT_SECONDS, connected, open_pool, require_sessions
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.migrations import require_schema
from pipeline.postgres.rows import TableRow, read_rows
from pipeline.roles.process import on_stop_signals
from pipeline.roles.role import LAST_FLUSH_SECONDS, START_TIMEOUT_SECONDS
from pipeline.serve.live import LiveTable
from pipeline.settings import Settings

# For requests that read Postgres; streams need none.
SERVE_CONNECTIONS: Final = 4

_log = structlog.get_logger(__name__)


async def run_serve(settings: Settings) -> None:
    """Serve the API and the live page until SIGTERM or SIGINT.

    Raises:
        ConfigError, ServiceUnavailable, SchemaMismatch: it could not start.
        PipelineError: Postgres refuses the listener for good, or Kafka the producer.
    """
    try:
        from pipeline.serve.api import LiveServer
        from pipeline.serve.http import listen, serve
        from pipeline.serve.reports import MAX_WAITING_REPORTS, Intake
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{error.name} is not installed: pip install 'agent-metadata-pipeline[serve]' for `serve`"
        ) from error
    if settings.serve_reports_token:
        settings.require_own_reports("POST /reports (AGENT_METADATA_SERVE_REPORTS_TOKEN) produces reports")
    database_url = settings.database_url.get_secret_value()
    async with connected(database_url) as connection:
        await require_schema(connection)
    listener_url, url_setting = settings.listener_url()
    await require_sessions(listener_url, url_setting)
    table = LiveTable(settings.serve_max_pairs)
    registry = CollectorRegistry()
    listener = MetadataListener(listener_url, registry=registry, url_setting=url_setting, deduplicate=False)
    pool = await open_pool(
        database_url,
        application_name="agent-metadata-serve",
        min_size=0,
        max_size=SERVE_CONNECTIONS,
        command_timeout_seconds=CONNECT_TIMEOUT_SECONDS,
    )
    stop = asyncio.Event()
    failures: list[BaseException] = []

    def fail(error: BaseException) -> None:
        failures.append(error)
        stop.set()

    token = settings.serve_reports_token
    publisher = await open_publisher(settings, MAX_WAITING_REPORTS) if token else None
    server = LiveServer(
        table=table,
        read=partial(_read, pool),
        why_not_ready=lambda: (
            None if listener.is_following else "Postgres is unavailable; the last known rows are shown"
        ),
        registry=registry,
        freshness=listener.freshness,
        token=settings.serve_token.get_secret_value() if settings.serve_token else None,
        is_local=_is_loopback(settings.serve_host),
        cors_origins=[origin.strip() for origin in settings.serve_cors_origins.split(",") if origin.strip()],
        intake=Intake(token.get_secret_value(), partial(_send, publisher, settings.events_topic, fail))
        if token and publisher
        else None,
    )
    on_stop_signals(stop.set)
    async with pool:
        listening = listen(settings.serve_host, settings.serve_port)
        following = asyncio.create_task(_follow(listener, table))
        following.add_done_callback(lambda _: stop.set())
        host, port = listening.getsockname()[:2]
        _log.info(
            "serve_started",
            url=f"http://{host}:{port}/",
            token="required" if settings.serve_token else "none",
            reports="on" if publisher else "off",
        )
        await serve(server, listening, stop)
        if publisher is not None:
            await publisher.close(LAST_FLUSH_SECONDS)
        if following.done():
            following.result()
        following.cancel()
    if failures:
        raise failures[0]
    _log.info("serve_stopped")


async def open_publisher(settings: Settings, max_waiting: int) -> Publisher:
    """Make the producer for POST /reports: `send` never waits for room while at most `max_waiting` are unacknowledged.

    Raises:
        ConfigError, TopicMismatch: reports can't be produced to the events topic.
    """
    events = settings.declared_topics()["events"]
    try:
        await require_topics(settings.client_config(), {"events": events}, timeout_s=START_TIMEOUT_SECONDS)
    except ServiceUnavailable as error:  # the page needs no Kafka
        _log.warning("kafka_unavailable", error=str(error), advice="POST /reports answers 503 until it is back")
    # Twice as many: the client may still hold a report, for a moment, whose room is given to the next.
    own = {"partitioner": PARTITIONER, "queue.buffering.max.messages": 2 * max_waiting}
    return Publisher({**settings.client_config(), **own})


async def _send(
    publisher: Publisher, topic: str, on_refused: Callable[[BaseException], None], value: bytes, key: bytes
) -> asyncio.Future[None]:
    try:
        return await publisher.send(topic, value, key=key)
    except PipelineError as error:  # for good: a new process gets a new producer
        on_refused(error)
        raise


async def _follow(listener: MetadataListener, table: LiveTable) -> None:
    is_said = False
    async for change in listener.changes():
        table.change(*change)
        if table.left_out_pairs and not is_said:
            is_said = True
            _log.warning(
                "pairs_left_out",
                agent=str(change.agent_id),
                advice="the page and the streams show no further pairs: find out who makes so many, "
                "or raise AGENT_METADATA_SERVE_MAX_PAIRS, as memory allows",
            )


async def _read(pool: asyncpg.Pool, agent_ids: Sequence[UUID]) -> Sequence[TableRow]:
    async with translated_errors("reading metadata"), pool.acquire() as connection, connection.transaction():
        return await read_rows(connection, agent_ids)


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
