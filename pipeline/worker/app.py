"""The worker's Faust app: which of Faust's parts it uses, and with which settings."""

from __future__ import annotations

import logging
from typing import Final

import mode
from faust import streams

from pipeline.errors import ConfigError
from pipeline.kafka.chunks import FETCH_BYTES, MAX_CHUNKS_PER_POLL
from pipeline.kafka.credentials import faust_credentials
from pipeline.settings import Settings
from pipeline.worker.table import LatestTable, LatestTables
from pipeline.worker.transport import ChunkApp

# Chunks that may wait in the stream: each has a few thousand records, or one record however large.
_STREAM_BUFFER_CHUNKS: Final = 16
_YEAR_SECONDS: Final = 31_536_000


def new_app(settings: Settings) -> ChunkApp:
    """Make the app that consumes in chunks, keeps no changelog and crashes with its agent.

    Raises:
        ConfigError: Faust is installed without its compiled parts.
    """
    if streams._CStreamIterator is None:
        raise ConfigError("Faust runs without its compiled parts and would skip events: unset NO_CYTHON and reinstall")
    for subclass in (ChunkApp, LatestTable):
        # Faust's services log under the module of their class, and their starts and stops are of no interest.
        logging.getLogger(subclass.__module__).setLevel(logging.WARNING)
    session = settings.session_timeout_seconds
    return ChunkApp(
        settings.worker_group,
        broker=";".join(f"kafka://{server.strip()}" for server in settings.kafka_bootstrap_servers.split(",")),
        broker_credentials=faust_credentials(settings),
        Table=LatestTable,
        TableManager=LatestTables,
        store="memory://",
        autodiscover=False,
        web_enabled=False,
        topic_allow_declare=False,
        topic_disable_leader=True,
        table_standby_replicas=0,
        agent_supervisor=mode.CrashingSupervisor,
        cython_optimizations=True,
        stream_wait_empty=False,
        stream_buffer_maxsize=_STREAM_BUFFER_CHUNKS,
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=FETCH_BYTES,
        broker_max_poll_records=MAX_CHUNKS_PER_POLL,
        broker_max_poll_interval=_YEAR_SECONDS,  # a worker without partitions, or held up by Kafka, stays in the group
        broker_session_timeout=session,
        broker_heartbeat_interval=session / 3,
        broker_request_timeout=max(40.0, session),
        broker_rebalance_timeout=60.0,
        worker_redirect_stdouts=False,
    )
