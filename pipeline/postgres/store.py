"""Apply batches to Postgres: rows, progress and NOTIFY in one transaction."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, Literal, NamedTuple

import asyncpg

from pipeline.core.agent_ids import NOTIFY_CHANNEL, encode_agent_id_chunks
from pipeline.core.batch import Batch, Columns, Row, merge
from pipeline.data_files import data_dir
from pipeline.errors import ProgressGap, RowRejected, ServiceUnavailable
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.pooling import statements_to_keep

# Measured over 200,000 rows with the plan pinned: larger statements gain nothing more.
ROWS_PER_STATEMENT: Final = 1000
# A statement of 1,000 rows takes some milliseconds; one that takes this long has lost its server.
COMMAND_TIMEOUT_SECONDS: Final = 60.0
CONNECT_TIMEOUT_SECONDS: Final = 10.0
CLOSE_TIMEOUT_SECONDS: Final = 2.0
# After which Postgres ends a transaction whose sink has gone silent, frozen or waiting for Kafka: its locks hold back
# the partition's next owner.
IDLE_TRANSACTION_SECONDS: Final = 60.0
# Any number will do, as long as no other program of the database takes the same.
_REFILL_LOCK: Final = 723_621_911

# Sends a row to the dead-letter topic; what it returns is done when Kafka has it.
Reject = Callable[[Row, RowRejected], Awaitable[Awaitable[None]]]
Write = Callable[[Any, Columns], Awaitable[list[Any]]]


class PartitionId(NamedTuple):
    """One partition of one incarnation of a topic."""

    topic_id: str
    partition: int
    topic: str


class Received(NamedTuple):
    """A record of the batches topic; `batch` is None if it was dead-lettered and only its offset counts."""

    offset: int
    batch: Batch | None


@dataclass
class Applied:
    """What one transaction did."""

    batches: list[Batch] = field(default_factory=list)
    skipped: int = 0
    lost: int = 0
    given: int = 0
    rows: int = 0
    agent_ids: set[uuid.UUID] = field(default_factory=set)
    stale: int = 0
    payloads: int = 0
    rejected: int = 0
    dead_letters: list[Awaitable[None]] = field(default_factory=list)
    undeclared: int = 0


@cache
def statement(name: str) -> str:
    """Return the SQL of `sql/<name>.sql`."""
    return (data_dir("sql") / f"{name}.sql").read_text(encoding="utf-8")


class Store:
    """Writes to one database through a pool; safe to share among partitions of one sink."""

    def __init__(self, pool: asyncpg.Pool, *, undeclared: Literal["insert", "ignore"], notify: bool) -> None:
        self._pool = pool
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
        """Open the pool; the URL may lead through another one, as PgBouncer.

        Raises:
            ServiceUnavailable, ConfigError: the database can't be reached, or refuses us.
        """
        async with translated_errors("connecting"):
            pool = await asyncpg.create_pool(
                database_url,
                min_size=1,
                max_size=connections,
                timeout=CONNECT_TIMEOUT_SECONDS,
                command_timeout=COMMAND_TIMEOUT_SECONDS,
                server_settings={"application_name": application_name},
                statement_cache_size=await statements_to_keep(database_url, CONNECT_TIMEOUT_SECONDS),
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
        """Return where to go on in each partition; one that was never applied is missing."""
        async with (
            translated_errors("reading progress"),
            self._pool.acquire() as connection,
            connection.transaction(),  # every statement is in one, so that a pool may stand between
        ):
            rows = await connection.fetch(statement("read_progress"), topic_id, list(partitions))
        return {row["partition"]: row["next_offset"] for row in rows}

    async def apply(
        self, target: PartitionId, received: Sequence[Received], reject: Reject, *, earliest: int = 0
    ) -> Applied:
        """Apply records of one partition of the batches topic, given in offset order, exactly once.

        `earliest` is the lowest offset that the topic still holds, where that is known to matter.

        Guarantee: rows, NOTIFY and progress commit together or not at all. What another sink applied meanwhile, and
        batches whose source range is applied already, change nothing. A row that Postgres refuses goes to `reject`,
        at least once, before the commit; all others are written.

        Raises:
            ServiceUnavailable: nothing was applied; try again.
            ProgressGap: nothing was applied; records before these are missing.
        """
        applied = Applied()
        try:
            try:
                await self._apply(target, received, None, earliest, applied)
            except RowRejected:
                # Rare: so only then are savepoints paid for.
                applied = Applied()
                await self._apply(target, received, reject, earliest, applied)
        except ServiceUnavailable as error:
            error.unpublished = applied.payloads
            raise
        return applied

    async def _apply(
        self,
        target: PartitionId,
        received: Sequence[Received],
        reject: Reject | None,
        earliest: int,
        applied: Applied,
    ) -> None:
        async with (
            translated_errors("applying batches"),
            self._pool.acquire() as connection,
            connection.transaction(),
        ):
            await _begin_write(connection)
            if reject is not None:
                # A check that waits for the commit would refuse the whole transaction, and no row could be blamed.
                await connection.execute("set constraints all immediate")
            progress = await self._lock_progress(connection, target, received)
            reached = dict(progress)
            _choose(target, received, reached, applied, earliest)
            rows = merge(applied.batches)
            applied.given = len(rows.keys)
            for start in range(0, len(rows.keys), ROWS_PER_STATEMENT):
                part = rows.part(start, start + ROWS_PER_STATEMENT)
                if reject is None:
                    _count(await self._write(connection, part), applied)
                else:
                    await _write_bisecting(connection, part, applied, reject, self._write)
            await self._notify(connection, applied)
            moved = [(*partition, offset) for partition, offset in reached.items() if offset != progress[partition]]
            if moved:
                topic_ids, partitions, offsets = (list(column) for column in zip(*moved, strict=True))
                await connection.execute(statement("save_progress"), topic_ids, partitions, offsets)
            await asyncio.gather(*applied.dead_letters)

    async def replay(self, rows: Columns, reject: Reject) -> Applied:
        """Write those rows that the table holds in an older state, in one transaction; sorted, each pair once.

        Guarantee: a row never goes backwards, and on equal times it stays; NOTIFY commits with the rows. A row that
        Postgres refuses goes to `reject`, and all others are written. `undeclared` counts the pairs that were left out
        for want of a row.

        Raises:
            ServiceUnavailable: nothing was written; try again.
        """
        applied = Applied(given=len(rows.keys))
        async with translated_errors("replaying rows"), self._pool.acquire() as connection, connection.transaction():
            await _begin_write(connection)
            await connection.execute("set constraints all immediate")
            await _write_bisecting(connection, rows, applied, reject, self._write_older)
            await self._notify(connection, applied)
            await asyncio.gather(*applied.dead_letters)
        return applied

    async def count_replay(self, rows: Columns) -> Applied:
        """Count what `replay` would do with these rows now, and write nothing.

        Raises:
            ServiceUnavailable: Postgres did not answer.
        """
        applied = Applied(given=len(rows.keys))
        columns = (rows.agent_ids, rows.keys, rows.collected_at_us)
        async with translated_errors("comparing rows"), self._pool.acquire() as connection, connection.transaction():
            await _begin_write(connection)
            _count([await connection.fetchrow(statement("replay_count"), *columns, self._is_inserting)], applied)
        return applied

    async def is_emptied(self) -> bool:
        """Tell whether the table lost its rows, to a crash or to TRUNCATE, since it was last known to be whole.

        A rewrite of the table, as by VACUUM FULL, looks the same.

        Raises:
            ServiceUnavailable: Postgres did not answer.
        """
        async with translated_errors("looking at the table"), self._pool.acquire() as connection:
            table = await connection.fetchrow(statement("read_epoch"))
            if table["whole_filenode"] is None and not table["is_unlogged"]:
                # A crash empties the note, but not a LOGGED table.
                await connection.execute(statement("save_epoch"), table["filenode"])
        return epoch_is_over(table)

    @asynccontextmanager
    async def refilling(self) -> AsyncIterator[bool]:
        """Note, when the block ends without an error, that the table is whole; false: another process is at it.

        Guarantee: a crash or TRUNCATE within the block is not noted as whole: a crash cuts the block's own connection,
        and the file is the one from before the block.

        Raises:
            ServiceUnavailable: Postgres did not answer, or has gone meanwhile; nothing was noted.
        """
        async with translated_errors("refilling the table"), self._pool.acquire() as connection:
            if not await connection.fetchval(statement("lock_refill"), _REFILL_LOCK):
                yield False
                return
            # The pool frees the lock when it takes the connection back.
            filenode = (await connection.fetchrow(statement("read_epoch")))["filenode"]
            yield True
            await connection.execute(statement("save_epoch"), filenode)

    async def _notify(self, connection: Any, applied: Applied) -> None:
        if self._is_notifying and applied.agent_ids:
            payloads = encode_agent_id_chunks(sorted(applied.agent_ids))
            applied.payloads = len(payloads)
            await connection.execute(statement("notify"), NOTIFY_CHANNEL, payloads)

    async def _lock_progress(
        self, connection: Any, target: PartitionId, received: Sequence[Received]
    ) -> dict[tuple[str, int], int]:
        sources = {
            PartitionId(item.batch.source.topic_id, item.batch.source.partition, item.batch.source.topic)
            for item in received
            if item.batch is not None
        }
        wanted = sorted(sources | {target})
        rows = await connection.fetch(
            statement("lock_progress"),
            [item.topic_id for item in wanted],
            [item.partition for item in wanted],
            [item.topic for item in wanted],
        )
        return {(row["topic_id"], row["partition"]): row["next_offset"] for row in rows}

    async def _write(self, connection: Any, rows: Columns) -> list[Any]:
        updated = await connection.fetchrow(statement("update_rows"), *rows)
        if not self._is_inserting or updated["rows"] == len(rows.keys):
            return [updated]
        return [updated, await connection.fetchrow(statement("insert_rows"), *rows)]

    async def _write_older(self, connection: Any, rows: Columns) -> list[Any]:
        return [await connection.fetchrow(statement("replay_rows"), *rows, self._is_inserting)]


async def _write_bisecting(connection: Any, rows: Columns, applied: Applied, reject: Reject, write: Write) -> None:
    """Write what can be written; costs about 2 * log2(rows) statements for each row that can't."""
    try:
        async with translated_errors("writing rows"), connection.transaction():
            changed = await write(connection, rows)
    except RowRejected as error:
        if len(rows.keys) == 1:
            applied.dead_letters.append(await reject(next(rows.rows()), error))
            applied.rejected += 1
            return
        middle = len(rows.keys) // 2
        await _write_bisecting(connection, rows.part(0, middle), applied, reject, write)
        await _write_bisecting(connection, rows.part(middle, len(rows.keys)), applied, reject, write)
    else:
        _count(changed, applied)


async def _begin_write(connection: Any) -> None:
    await connection.execute(statement("begin_write"), str(round(IDLE_TRANSACTION_SECONDS * 1000)))


def _choose(
    target: PartitionId,
    received: Sequence[Received],
    reached: dict[tuple[str, int], int],
    applied: Applied,
    earliest: int,
) -> None:
    """Pick the batches to apply, in order, moving `reached` as they will have been."""
    own = target[:2]
    if received[0].offset > max(reached[own], earliest):
        raise ProgressGap(reached[own], received[0].offset)
    if 0 < reached[own] < received[0].offset:
        applied.lost = received[0].offset - reached[own]
    for offset, batch in received:
        if offset < reached[own]:
            continue  # another owner of this partition applied it: not even counted as skipped
        reached[own] = offset + 1
        if batch is None:
            continue
        source = (batch.source.topic_id, batch.source.partition)
        if batch.source.last < reached[source]:
            applied.skipped += 1
            continue
        applied.batches.append(batch)
        if batch.completes_source:
            reached[source] = batch.source.last + 1


def _count(changed: Sequence[Any], applied: Applied) -> None:
    for result in changed:
        applied.rows += result["rows"]
        applied.agent_ids.update(result["agent_ids"] or ())
        applied.undeclared += result.get("undeclared", 0)
        applied.stale += result.get("stale", 0)


def epoch_is_over(table: Any) -> bool:
    """Tell from a row of read_epoch.sql whether the table was emptied; a crash empties an UNLOGGED one only."""
    if table["whole_filenode"] is None:
        return bool(table["is_unlogged"])
    return bool(table["whole_filenode"] != table["filenode"])


async def read_rows(connection: Any, agent_ids: Sequence[uuid.UUID] | None) -> Sequence[Any]:
    """Read (workspace_agent_id, key, value, error, collected_at) of some agents, or of all (None)."""
    async with translated_errors("reading metadata"):
        if agent_ids is None:
            return list(await connection.fetch(statement("read_all_rows")))
        return list(await connection.fetch(statement("read_rows"), list(agent_ids)))
