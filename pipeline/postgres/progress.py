"""How far each partition is applied: why a batch takes effect once, whoever applies it and however often it arrives.

Two kinds of progress are kept, in the transaction that writes the rows: for each partition of the batches topic the
next batch, for each partition of the events topic the next source offset that no applied window has covered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

from pipeline.core.batch import Batch
from pipeline.core.report import is_name_of
from pipeline.errors import ProgressGap
from pipeline.postgres.connections import Connection
from pipeline.postgres.statements import statement

# By (topic id, partition): the next offset to apply.
Progress: TypeAlias = Mapping[tuple[str, int], int]


class PartitionId(NamedTuple):
    """One partition of one incarnation of a topic."""

    topic_id: str
    partition: int
    topic: str


class Received(NamedTuple):
    """A record of the batches topic; `batch` is None if it was dead-lettered and only its offset counts."""

    offset: int
    batch: Batch | None


class Plan(NamedTuple):
    """What to apply, in order, and which progress moves to where; `lost` records were deleted before they were read."""

    batches: Sequence[Batch]
    skipped: int
    lost: int
    moves: Progress


def called(agent_id: str, received: Iterable[Received]) -> str:
    """Return what an agent is called in the batches that have its rows: its name, or its id."""
    names = (record.batch.names.get(agent_id) for record in received if record.batch is not None)
    return next((name for name in names if name is not None and is_name_of(agent_id, name)), agent_id)


async def lock_progress(connection: Connection, target: PartitionId, received: Sequence[Received]) -> Progress:
    """Read the progress of a partition and of those that its batches come from, locked until the transaction ends."""
    sources = {
        PartitionId(record.batch.source.topic_id, record.batch.source.partition, record.batch.source.topic)
        for record in received
        if record.batch is not None
    }
    partitions = sorted(sources | {target})
    rows = await connection.fetch(
        statement("lock_progress"),
        [item.topic_id for item in partitions],
        [item.partition for item in partitions],
        [item.topic for item in partitions],
    )
    return {(row["topic_id"], row["partition"]): row["next_offset"] for row in rows}


def choose_batches(target: PartitionId, received: Sequence[Received], progress: Progress, earliest: int) -> Plan:
    """Decide what to apply of records in offset order; `earliest` is the lowest offset that Kafka is known to hold.

    Raises:
        ProgressGap: records before these are missing.
    """
    own, first = target[:2], received[0].offset
    if first > max(progress[own], earliest):
        raise ProgressGap(progress[own], first)
    lost = first - progress[own] if 0 < progress[own] < first else 0
    reached, batches, skipped = dict(progress), [], 0
    for offset, batch in received:
        if offset < reached[own]:
            continue  # another owner of this partition applied it: not even counted as skipped
        reached[own] = offset + 1
        if batch is None:
            continue
        source = (batch.source.topic_id, batch.source.partition)
        if batch.source.last < reached[source]:
            skipped += 1
            continue
        batches.append(batch)
        if batch.completes_source:
            reached[source] = batch.source.last + 1
    moves = {key: offset for key, offset in reached.items() if offset != progress[key]}
    return Plan(batches, skipped, lost, moves)


async def save_progress(connection: Connection, moves: Progress) -> None:
    """Note how far partitions are applied, in the transaction that locked them."""
    if moves:
        topic_ids, partitions = zip(*moves, strict=True)
        await connection.execute(statement("save_progress"), topic_ids, partitions, list(moves.values()))
