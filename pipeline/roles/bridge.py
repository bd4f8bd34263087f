"""The bridge's process: a Bridge from coder's table, what watches it, and how it stops."""

from __future__ import annotations

import asyncio

import structlog
from prometheus_client import CollectorRegistry

from pipeline.bridge import URL_SETTING, Bridge, Copied, require_another_table
from pipeline.errors import ConfigError
from pipeline.kafka.publisher import PARTITIONER, Publisher
from pipeline.kafka.topics import require_topics
from pipeline.monitoring.health import Heartbeat, exit_when_stuck, serve_health
from pipeline.monitoring.metrics import BridgeMetrics
from pipeline.postgres.connections import require_sessions
from pipeline.roles.process import on_stop_signals
from pipeline.roles.role import LAST_FLUSH_SECONDS, START_TIMEOUT_SECONDS
from pipeline.settings import Settings

_log = structlog.get_logger(__name__)


async def run_bridge(settings: Settings, *, once: bool = False) -> Copied | None:
    """Send the changes of coder's table until SIGTERM or SIGINT; with `once`, send the table and return the counts.

    Raises:
        ConfigError, TopicMismatch, ServiceUnavailable: it could not start.
        PipelineError: it failed; what Kafka had not acknowledged is sent by the next start.
    """
    settings.require_own_reports("the bridge produces reports")
    source_url = await _find_source(settings)
    events = settings.declared_topics()["events"]
    await require_topics(settings.client_config(), {"events": events}, timeout_s=START_TIMEOUT_SECONDS)
    registry = CollectorRegistry()
    publisher = Publisher({**settings.client_config(), "partitioner": PARTITIONER})
    bridge = Bridge(
        source_url,
        publisher=publisher,
        topic=events.name,
        poll_seconds=settings.bridge_poll_seconds,
        metrics=BridgeMetrics(registry),
    )
    heartbeat = Heartbeat(settings.stuck_seconds)
    serve_health(settings.metrics_port, registry, why_not_live=heartbeat.why_stuck, why_not_ready=bridge.why_not_ready)
    exit_when_stuck(heartbeat.why_stuck)
    copying = asyncio.create_task(bridge.copy() if once else bridge.run())

    def stop() -> None:
        copying.cancel()

    on_stop_signals(stop)
    _log.info("bridge_started", topic=events.name)
    try:
        return await copying
    except asyncio.CancelledError:
        _log.info("bridge_stopped")
        return None
    finally:
        if left := await publisher.close(LAST_FLUSH_SECONDS):
            _log.warning("reports_not_acknowledged", count=left, advice="the next start sends the whole table again")


async def _find_source(settings: Settings) -> str:
    if settings.bridge_database_url is None:
        raise ConfigError(f"{URL_SETTING} is not set: set it to coder's database, postgresql://user@host/database")
    url = settings.bridge_database_url.get_secret_value()
    await require_sessions(url, URL_SETTING, URL_SETTING)
    await require_another_table(url, settings.database_url.get_secret_value())
    return url
