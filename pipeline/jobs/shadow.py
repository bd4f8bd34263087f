"""Compare a shadow table with the one that coder's own batcher writes."""

from __future__ import annotations

import json
from typing import Final

import msgspec
from asyncpg import Connection

from pipeline.errors import ConfigError, SchemaMismatch
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.statements import fetch_one, statement

_MAX_PAIRS: Final = 20
_COMPARE_SECONDS: Final = 60.0


class ShadowDiff(msgspec.Struct):
    """How many pairs of both tables agree in value and error; `pairs` lists the first 20 that don't.

    `only_shadow` pairs are not a difference, as coder's batcher updates declared pairs only. `unsettled` pairs differ,
    and changed too recently to say whether that will last.
    """

    same: int
    different: int
    only_live: int
    only_shadow: int
    unsettled: int
    pairs: list[dict[str, str | None]]


async def shadow_diff(connection: Connection, *, live_schema: str, settle_seconds: float) -> ShadowDiff:
    """Compare the table in the connection's search path with the live schema's; writes nothing.

    Raises:
        ConfigError: both are the same table, or the live schema has none.
        SchemaMismatch: there is no shadow table.
        ServiceUnavailable: Postgres did not answer.
    """
    async with translated_errors("comparing tables"):
        tables = await fetch_one(connection, statement("shadow_tables"), live_schema)
        if tables["shadow"] is None:
            raise SchemaMismatch("there is no shadow table: run `agent-metadata db migrate` with the same DATABASE_URL")
        if tables["live"] is None:
            raise ConfigError(f"schema {live_schema} has no workspace_agent_metadata: name coder's schema by --live")
        if tables["live"] == tables["shadow"]:
            raise ConfigError(
                f"DATABASE_URL points to the table of {live_schema} itself: add search_path=shadow to it, "
                "see docs/coder.md"
            )
        query = statement("shadow_diff").replace("live_schema.", f"{tables['live_schema']}.")
        row = await fetch_one(connection, query, settle_seconds, _MAX_PAIRS, timeout_seconds=_COMPARE_SECONDS)
    return ShadowDiff(**{**row, "pairs": json.loads(row["pairs"])})
