"""Names of agents whose id is no UUID: kept with their rows, and not written again with each batch."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Final

from pipeline.core.report import is_name_of
from pipeline.postgres.connections import Connection
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.statements import statement

# Agents to remember; at about 150 bytes each, 15 MB. Beyond these some names are written again, which changes nothing.
MAX_REMEMBERED: Final = 100_000
# A name that was lost (a row deleted, a table restored, a standby that lacks the last transactions) comes back with a
# report after this time at most. Writing 100,000 names that are there takes half a second.
REMEMBERED_SECONDS: Final = 600.0


class WrittenNames:
    """Which agents' names were written lately, by one process."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Start without any; `clock` returns seconds."""
        self._clock = clock
        self._agent_ids: set[str] = set()
        self._forget_at = 0.0

    def missing(self, names: Iterable[Mapping[str, str]]) -> dict[str, str]:
        """Return those of the names that are to be written; a text that does not make its agent's id is no name."""
        if self._clock() >= self._forget_at or len(self._agent_ids) >= MAX_REMEMBERED:
            self._agent_ids.clear()
            self._forget_at = self._clock() + REMEMBERED_SECONDS
        return {
            agent_id: some[agent_id]
            for some in names
            for agent_id in some.keys() - self._agent_ids
            if is_name_of(agent_id, some[agent_id])
        }

    def note(self, agent_ids: Iterable[str]) -> None:
        """Remember agents whose names were written; call it after the commit."""
        self._agent_ids.update(agent_ids)


async def read_name(connection: Connection, agent_id: str) -> str | None:
    """Return what an agent calls itself, if that is known and no UUID."""
    async with translated_errors("reading names"):
        name: str | None = await connection.fetchval(statement("read_name"), uuid.UUID(agent_id))
    return name


async def write_names(connection: Connection, names: Mapping[str, str]) -> list[str]:
    """Keep the names of agents that have rows by now, in the transaction that writes these; return their ids."""
    if not names:
        return []
    rows = await connection.fetch(statement("insert_names"), list(names), list(names.values()))
    return [row["agent_id"] for row in rows]
