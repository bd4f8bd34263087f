"""Coder's own tables, and a re-made replica of its batcher that writes to them."""

from __future__ import annotations

import uuid
from collections.abc import Iterable
from datetime import datetime

import asyncpg

from pipeline.core.notify import NOTIFY_CHANNEL, encode_agent_id_chunks

# As coder makes it: a definition has no defaults, and belongs to an agent.
CODERS_TABLES = """
create table workspace_agents (id uuid primary key);
create unlogged table workspace_agent_metadata (
    workspace_agent_id uuid not null references workspace_agents (id) on delete cascade,
    display_name varchar(127) not null,
    key varchar(127) not null,
    script varchar(65535) not null,
    value varchar(65535) not null default '',
    error varchar(65535) not null default '',
    timeout bigint not null,
    interval bigint not null,
    collected_at timestamptz not null default '0001-01-01 00:00:00+00',
    display_order integer not null default 0,
    primary key (workspace_agent_id, key)
);
insert into workspace_agents values ('00000000-0000-0000-0000-000000000001');
insert into workspace_agent_metadata
values ('00000000-0000-0000-0000-000000000001', 'CPU', 'cpu', 'top', '12%', '', 1, 10);
"""

# Without a guard, as metadatabatcher's: an older value overwrites a newer one.
_UPDATE = """
update workspace_agent_metadata as held
set value = new.value, error = new.error, collected_at = new.collected_at
from unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::timestamptz[])
    as new (agent_id, key, value, error, collected_at)
where held.workspace_agent_id = new.agent_id and held.key = new.key
"""


async def declare(connection: asyncpg.Connection, agents: Iterable[uuid.UUID], keys: Iterable[str]) -> None:
    """Insert agents and what they may report, as coder does when a workspace is built."""
    pairs = [(agent_id, key) for key in keys for agent_id in agents]
    await connection.executemany(
        "insert into workspace_agents values ($1) on conflict do nothing", [(a,) for a in agents]
    )
    await connection.executemany(
        "insert into workspace_agent_metadata (workspace_agent_id, display_name, key, script, timeout, interval)"
        " values ($1, $2, $2, 'top', 1, 10)",
        pairs,
    )


class CoderReplica:
    """The batcher of one of coder's servers: keeps the latest of each pair until it flushes, then perhaps notifies.

    With NATS as coder's pubsub, Postgres is not notified.
    """

    def __init__(self, database_url: str, *, notifies: bool) -> None:
        self._url = database_url
        self._notifies = notifies
        self._held: dict[tuple[uuid.UUID, str], tuple[str, str, datetime]] = {}

    def add(self, agent_id: uuid.UUID, key: str, value: str, collected_at: datetime, error: str = "") -> None:
        held = self._held.get((agent_id, key))
        if held is None or collected_at >= held[2]:
            self._held[agent_id, key] = (value, error, collected_at)

    async def flush(self) -> None:
        batch, self._held = self._held, {}
        if not batch:
            return
        columns = list(zip(*((*pair, *entry) for pair, entry in batch.items()), strict=True))
        connection = await asyncpg.connect(self._url)
        try:
            await connection.execute(_UPDATE, *columns)
            for payload in encode_agent_id_chunks(dict.fromkeys(columns[0])) if self._notifies else []:
                await connection.execute("select pg_notify($1, $2)", NOTIFY_CHANNEL, payload)
        finally:
            await connection.close()
