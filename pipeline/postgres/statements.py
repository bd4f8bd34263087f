"""The SQL of sql/*.sql, by name."""

from __future__ import annotations

from functools import cache

from asyncpg import Record

from pipeline.data_files import data_dir
from pipeline.postgres.connections import Connection


@cache
def statement(name: str) -> str:
    """Return the SQL of `sql/<name>.sql`."""
    return (data_dir("sql") / f"{name}.sql").read_text(encoding="utf-8")


async def fetch_one(
    connection: Connection, query: str, *arguments: object, timeout_seconds: float | None = None
) -> Record:
    """Run a query that always returns one row, such as an aggregate.

    Raises: what asyncpg raises; TimeoutError after `timeout_seconds`.
    """
    row = await connection.fetchrow(query, *arguments, timeout=timeout_seconds)
    assert row is not None
    return row
