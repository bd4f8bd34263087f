"""Whether the table is still whole, or was emptied under us: by TRUNCATE, or by a crash while it is UNLOGGED."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import asyncpg

from pipeline.postgres.errors import translated_errors
from pipeline.postgres.statements import fetch_one, statement

# Any number will do, as long as no other program of the database takes the same.
_REFILL_LOCK: Final = 723_621_911


class TableEpoch:
    """Compares the table's file with the one it had when it was last known to be whole."""

    def __init__(self, pool: asyncpg.Pool) -> None:
        self._pool = pool

    async def is_emptied(self) -> bool:
        """Tell whether the table lost its rows, to a crash or to TRUNCATE, since it was last known to be whole.

        A rewrite of the table, as by VACUUM FULL, looks the same.

        Raises:
            ServiceUnavailable: Postgres did not answer.
        """
        async with translated_errors("looking at the table"), self._pool.acquire() as connection:
            epoch = await fetch_one(connection, statement("read_epoch"))
            if epoch["whole_filenode"] is None and not epoch["is_unlogged"]:
                # A crash empties the note, but not a LOGGED table.
                await connection.execute(statement("save_epoch"), epoch["filenode"])
        return is_over(epoch)

    @asynccontextmanager
    async def refilling(self) -> AsyncIterator[bool]:
        """Note that the table is whole when the block ends without an error; yield False if another process refills it.

        Guarantee: a table that a crash or TRUNCATE empties within the block is not noted as whole: a crash cuts the
        block's own connection, and the file noted is the one from before the block.

        Raises:
            ServiceUnavailable: Postgres did not answer, or failed meanwhile; nothing was noted.
        """
        async with translated_errors("refilling the table"), self._pool.acquire() as connection:
            if not await connection.fetchval(statement("lock_refill"), _REFILL_LOCK):
                yield False
                return
            # The pool frees the lock when it takes the connection back.
            filenode = (await fetch_one(connection, statement("read_epoch")))["filenode"]
            yield True
            await connection.execute(statement("save_epoch"), filenode)


def is_over(epoch: asyncpg.Record) -> bool:
    """Tell from a row of read_epoch.sql whether the table was emptied; a crash empties an UNLOGGED one only."""
    if epoch["whole_filenode"] is None:
        return bool(epoch["is_unlogged"])
    return bool(epoch["whole_filenode"] != epoch["filenode"])
