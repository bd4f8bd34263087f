"""Read the table's rows, as listeners see them."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Final, NamedTuple

from pipeline.postgres.connections import Connection
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.statements import statement

# A few MB with usual values, 50 MB with values and errors at their limit.
ROWS_PER_PART: Final = 10_000


class TableRow(NamedTuple):
    """A pair as listeners see it; `name` is its agent's, if the agent's id is no UUID."""

    agent_id: uuid.UUID
    key: str
    value: str
    error: str
    collected_at: datetime
    name: str | None = None


async def read_rows(connection: Connection, agent_ids: Sequence[uuid.UUID]) -> list[TableRow]:
    """Read the rows of some agents, ordered by agent, display order and key."""
    async with translated_errors("reading metadata"):
        return [TableRow(*row) for row in await connection.fetch(statement("read_rows"), list(agent_ids))]


async def read_all_rows(connection: Connection) -> AsyncIterator[list[TableRow]]:
    """Read the whole table, ordered by agent and key, in parts of 10,000 rows, so that its size costs no memory.

    Each part is a statement of its own: it has what was committed before it, and no transaction stays open.
    """
    last: tuple[uuid.UUID, str] = uuid.UUID(int=0), ""
    while True:
        async with translated_errors("reading metadata"):
            found = await connection.fetch(statement("read_all_rows"), *last, ROWS_PER_PART + 1)
        rows = [TableRow(*row) for row in found]
        yield rows[:ROWS_PER_PART]
        if len(rows) <= ROWS_PER_PART:
            return
        last = rows[-1][:2]
