"""Apply batches to Postgres: rows, names, progress and NOTIFY in one transaction."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

import asyncpg

from pipeline.core.batch import Batch, Columns, Row, merge
from pipeline.core.notify import NOTIFY_CHANNEL, encode_agent_id_chunks
from pipeline.errors import FlushFailed, RowRejected, ServiceUnavailable
from pipeline.postgres.connections import CONNECT_TIMEOUT_SECONDS, Connection, open_pool
from pipeline.postgres.epoch import TableEpoch
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.names import WrittenNames, write_names
from pipeline.postgres.progress import PartitionId, Received, choose_batches, lock_progress, save_progress
from pipeline.postgres.statements import fetch_one, statement

# Measured over 200,000 rows with the plan pinned: larger statements gain nothing more.
ROWS_PER_STATEMENT: Final = 1000
# A statement of 1,000 rows takes a few milliseconds; one that takes this long has lost its server.
COMMAND_TIMEOUT_SECONDS: Final = 60.0
CLOSE_TIMEOUT_SECONDS: Final = 2.0
# After this, Postgres ends a transaction whose sink has gone silent, frozen or waiting for Kafka: its locks hold up the
# partition's next owner.
IDLE_TRANSACTION_SECONDS: Final = 60.0

# Sends a row to the dead-letter topic; the awaitable that it returns is done when Kafka has the row.
Reject: TypeAlias = Callable[[Row, RowRejected], Awaitable[Awaitable[None]]]
_Write: TypeAlias = Callable[[Connection, Columns], Awaitable["Written"]]


@dataclass(frozen=True)
class Written:
    """What statements changed; `stale` pairs have a newer row, `undeclared` ones have no row and are not given one.

    `inserted` of the rows are of pairs that had none, as far as `apply` wrote them. `dead_letters` are done when Kafka
    has the rows that Postgres refused.
    """

    rows: int = 0
    inserted: int = 0
    agent_ids: frozenset[uuid.UUID] = frozenset()
    stale: int = 0
    undeclared: int = 0
    dead_letters: tuple[Awaitable[None], ...] = ()

    @property
    def rejected(self) -> int:
        """How many rows Postgres refused."""
        return len(self.dead_letters)


@dataclass(frozen=True)
class Applied:
    """What one transaction did: it applied `batches`, merged into `pairs` rows, and sent `payloads` NOTIFYs."""

    batches: Sequence[Batch] = ()
    skipped: int = 0
    lost: int = 0
    pairs: int = 0
    written: Written = Written()
    payloads: int = 0


class Store:
    """Writes to one database through a pool; safe to share among partitions of one sink."""

    def __init__(self, pool: asyncpg.Pool, *, undeclared: Literal["insert", "ignore"], notify: bool) -> None:
        """Take over an open pool, which `close` closes; `undeclared` says whether pairs without a row get one."""
        self.epoch = TableEpoch(pool)
        self._pool = pool
        self._written_names = WrittenNames()
        self._is_inserting = undeclared == "insert"
        self._is_notifying = notify

    @classmethod
    async def connect(
        cls,
        database_url: str,
        *,
        connections: int,
        undeclared: Literal["insert", "ignore"],
        notify: bool,
        application_name: str = "agent-metadata-sink",
    ) -> Store:
        """Open the pool, of at most `connections`; the URL may go through a pooler such as PgBouncer.

        Raises:
            ServiceUnavailable, ConfigError: the database can't be reached, or refuses us.
        """
        pool = await open_pool(
            database_url,
            application_name=application_name,
            max_size=connections,
            command_timeout_seconds=COMMAND_TIMEOUT_SECONDS,
        )
        return cls(pool, undeclared=undeclared, notify=notify)

    async def close(self) -> None:
        """Close the pool; a connection that doesn't answer is cut."""
        try:
            await asyncio.wait_for(self._pool.close(), CLOSE_TIMEOUT_SECONDS)
        except TimeoutError:
            self._pool.terminate()

    async def ping(self) -> None:
        """Return if Postgres answers.

        Raises:
            ServiceUnavailable: it doesn't, within 10 s.
        """
        async with (
            translated_errors("answering"),
            asyncio.timeout(CONNECT_TIMEOUT_SECONDS),
            self._pool.acquire() as connection,
        ):
            await connection.execute("select")

    async def next_offsets(self, topic_id: str, partitions: Sequence[int]) -> Mapping[int, int]:
        """Return the next offset to apply of each partition; one that was never applied is missing."""
        async with (
            translated_errors("reading progress"),
            self._pool.acquire() as connection,
            connection.transaction(),  # for a pooler, see connections.py
        ):
            rows = await connection.fetch(statement("read_progress"), topic_id, list(partitions))
        return {row["partition"]: row["next_offset"] for row in rows}

    async def apply(
        self, target: PartitionId, received: Sequence[Received], reject: Reject, *, earliest: int = 0
    ) -> Applied:
        """Apply records of one partition of the batches topic, given in offset order, exactly once.

        `earliest` is the lowest offset that the topic still holds, where that is known to matter.

        Guarantee: rows, their agents' names, NOTIFY and progress commit together or not at all. What another sink
        applied meanwhile, and batches whose source range is applied already, change nothing. A row that Postgres
        refuses goes to `reject`, at least once, before the commit; all others are written.

        Raises:
            FlushFailed: nothing was applied; try again.
            ProgressGap: nothing was applied; records before these are missing.
            ConfigError: nothing was applied; Postgres refuses us.
        """
        try:
            return await self._apply(target, received, None, earliest)
        except RowRejected:
            # Rare, so savepoints are paid for only then.
            return await self._apply(target, received, reject, earliest)

    async def _apply(
        self, target: PartitionId, received: Sequence[Received], reject: Reject | None, earliest: int
    ) -> Applied:
        payloads: list[str] = []
        try:
            async with (
                translated_errors("applying batches"),
                self._pool.acquire() as connection,
                connection.transaction(),
            ):
                await _begin_write(connection)
                if reject is not None:
                    await _check_constraints_at_once(connection)
                plan = choose_batches(target, received, await lock_progress(connection, target, received), earliest)
                rows = merge(plan.batches)
                written = await self._write_in_parts(connection, rows, reject)
                missing = self._written_names.missing(batch.names for batch in plan.batches)
                named = await write_names(connection, missing)
                payloads = self._payloads(written)
                await _notify(connection, payloads)
                await save_progress(connection, plan.moves)
                await asyncio.gather(*written.dead_letters)
        except ServiceUnavailable as error:
            raise FlushFailed(str(error), payloads=len(payloads)) from error
        self._written_names.note(named)
        return Applied(plan.batches, plan.skipped, plan.lost, len(rows.keys), written, len(payloads))

    async def replay(self, rows: Columns, names: Mapping[str, str], reject: Reject) -> Written:
        """Write those rows that are newer than the table's, in one transaction; sorted, each pair once.

        `names` are those of the rows' agents whose id is no UUID.

        Guarantee: a row never goes backwards, and in a tie it stays; names and NOTIFY commit with the rows. A row that
        Postgres refuses goes to `reject`, and all others are written. `undeclared` counts the pairs that were skipped
        because they have no row.

        Raises:
            ServiceUnavailable: nothing was written; try again.
        """
        async with translated_errors("replaying rows"), self._pool.acquire() as connection, connection.transaction():
            await _begin_write(connection)
            await _check_constraints_at_once(connection)
            written = await _write_bisecting(connection, rows, reject, self._write_older)
            named = await write_names(connection, self._written_names.missing([names]))
            await _notify(connection, self._payloads(written))
            await asyncio.gather(*written.dead_letters)
        self._written_names.note(named)
        return written

    async def count_replay(self, rows: Columns) -> Written:
        """Count what `replay` would do with these rows now, and write nothing; no agents are named.

        Raises:
            ServiceUnavailable: Postgres did not answer.
        """
        columns = (rows.agent_ids, rows.keys, rows.collected_at_us)
        async with translated_errors("comparing rows"), self._pool.acquire() as connection, connection.transaction():
            await _begin_write(connection)
            return _parse_counts(await fetch_one(connection, statement("replay_count"), *columns, self._is_inserting))

    def _payloads(self, written: Written) -> list[str]:
        return encode_agent_id_chunks(sorted(written.agent_ids)) if self._is_notifying else []

    async def _write_in_parts(self, connection: Connection, rows: Columns, reject: Reject | None) -> Written:
        results = []
        for start in range(0, len(rows.keys), ROWS_PER_STATEMENT):
            part = rows.part(start, start + ROWS_PER_STATEMENT)
            if reject is None:
                results.append(await self._write(connection, part))
            else:
                results.append(await _write_bisecting(connection, part, reject, self._write))
        return _total(results)

    async def _write(self, connection: Connection, rows: Columns) -> Written:
        updated = _parse_counts(await fetch_one(connection, statement("update_rows"), *rows))
        if not self._is_inserting or updated.rows == len(rows.keys):
            return updated
        inserted = _parse_counts(await fetch_one(connection, statement("insert_rows"), *rows))
        return _total([updated, replace(inserted, inserted=inserted.rows)])

    async def _write_older(self, connection: Connection, rows: Columns) -> Written:
        return _parse_counts(await fetch_one(connection, statement("replay_rows"), *rows, self._is_inserting))


async def _begin_write(connection: Connection) -> None:
    await connection.execute(statement("begin_write"), str(round(IDLE_TRANSACTION_SECONDS * 1000)))


async def _check_constraints_at_once(connection: Connection) -> None:
    """Have deferred constraints checked by each statement; at the commit, no row could be blamed."""
    await connection.execute("set constraints all immediate")


async def _write_bisecting(connection: Connection, rows: Columns, reject: Reject, write: _Write) -> Written:
    """Write what can be written; costs about 2 * log2(rows) statements for each row that can't."""
    try:
        async with translated_errors("writing rows"), connection.transaction():
            return await write(connection, rows)
    except RowRejected as error:
        if len(rows.keys) == 1:
            return Written(dead_letters=(await reject(next(rows.rows()), error),))
    middle = len(rows.keys) // 2
    first = await _write_bisecting(connection, rows.part(0, middle), reject, write)
    return _total([first, await _write_bisecting(connection, rows.part(middle, len(rows.keys)), reject, write)])


async def _notify(connection: Connection, payloads: Sequence[str]) -> None:
    if payloads:
        await connection.execute(statement("notify"), NOTIFY_CHANNEL, payloads)


def _parse_counts(row: asyncpg.Record) -> Written:
    """Read the one row that every writing statement of sql/ returns."""
    return Written(
        rows=row["rows"],
        agent_ids=frozenset(row["agent_ids"] or ()),
        stale=row.get("stale", 0),
        undeclared=row.get("undeclared", 0),
    )


def _total(results: Iterable[Written]) -> Written:
    results = list(results)
    return Written(
        rows=sum(written.rows for written in results),
        inserted=sum(written.inserted for written in results),
        agent_ids=frozenset().union(*(written.agent_ids for written in results)),
        stale=sum(written.stale for written in results),
        undeclared=sum(written.undeclared for written in results),
        dead_letters=tuple(itertools.chain.from_iterable(written.dead_letters for written in results)),
    )
