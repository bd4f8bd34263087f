"""Replay ranges of a topic into the table: fold one partition at a time, then write what is newer than its row."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import msgspec

from pipeline.core.batch import Columns, Row
from pipeline.core.record import Record
from pipeline.kafka.chunk_reader import ChunkReader
from pipeline.kafka.range_reader import OffsetRange
from pipeline.postgres.store import Written
from pipeline.replay.folds import Fold
from pipeline.replay.pace import Pace

# Pairs in memory at once: 250 MB at about 500 bytes per pair, five times that with values at their limit of 2 kB.
MAX_PAIRS: Final = 500_000
# Rows per statement and transaction: few, so that locks are brief and the live sink gets its turn.
ROWS_PER_WRITE: Final = 1000

# Rows, and the names of those of their agents whose id is no UUID.
Write = Callable[[Columns, Mapping[str, str]], Awaitable[Written]]


class Summary(msgspec.Struct):
    """What a replay did, or what a dry run would have done.

    Units: `records` read and `entries` in them; `dead` records (or rows of batches) that can't be used; all others
    count pairs. A pair counts once in each partition that has it: once in all, if the record key is the agent's id.
    """

    records: int = 0
    entries: int = 0
    dead: int = 0
    pairs: int = 0
    changed: int = 0
    undeclared: int = 0
    refused: int = 0

    @property
    def already_newer(self) -> int:
        """Pairs whose row was at least as new as the replayed entry."""
        return max(0, self.pairs - self.changed - self.undeclared - self.refused)

    def add(self, other: Summary) -> None:
        """Add the counts of another summary."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Interrupted(Exception):
    """The replay was stopped; the partition it was at has to be replayed again from its start."""


class _Share(NamedTuple):
    """A share of all pairs: those whose checksum leaves `remainder` when divided by `divisor`."""

    remainder: int
    divisor: int

    def includes(self, agent_id: str, key: str) -> bool:
        return zlib.crc32(f"{agent_id}/{key}".encode(errors="replace")) % self.divisor == self.remainder

    def halves(self) -> tuple[_Share, _Share]:
        return _Share(self.remainder, self.divisor * 2), _Share(self.remainder + self.divisor, self.divisor * 2)


@dataclass(frozen=True)
class PairFilter:
    """Which pairs to replay; an empty set means all."""

    agent_ids: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.agent_ids or self.keys)

    def matches(self, agent_id: str, key: str) -> bool:
        """Tell whether to replay a pair."""
        return (not self.agent_ids or agent_id in self.agent_ids) and (not self.keys or key in self.keys)


EVERYTHING: Final = PairFilter()


class Replay:
    """Replays offset ranges, one partition after the other.

    A partition's pairs are written once, after its whole range was read, each with its latest entry. So ties are
    decided as in the live pipeline, counts are exact, and an interrupted partition can simply be replayed again. If
    there are more pairs than `max_pairs`, the range is read several times, each time for a share of the pairs.
    """

    def __init__(
        self,
        reader: ChunkReader,
        *,
        new_fold: Callable[[int], Fold],
        write: Write,
        pace: Pace,
        only: PairFilter = EVERYTHING,
        max_pairs: int = MAX_PAIRS,
        on_read: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Make a replay.

        `new_fold(capacity)` makes an empty fold; `write(rows, names)` takes at most 1,000 rows per call;
        `on_read(records)` is called with the number of offsets passed since the last call.

        Raises:
            ValueError: `max_pairs` is less than 2, which can't be shared out.
        """
        if max_pairs < 2:
            raise ValueError("max_pairs must be at least 2")
        self._reader = reader
        self._new_fold = new_fold
        self._write = write
        self._pace = pace
        self._only = only
        self._max_pairs = max_pairs
        self._on_read = on_read
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Make `run` raise Interrupted soon."""
        self._stop.set()

    async def run(
        self, ranges: Iterable[OffsetRange], summary: Summary, on_done: Callable[[int], None] = lambda _: None
    ) -> None:
        """Replay ranges and add up in `summary`; `on_done(partition)` is called when a partition is written.

        Changed rows count at once, everything else when the partition is done, so the counts stay right if an
        interrupted partition is replayed again.

        Raises:
            Interrupted: `stop` was called.
            ServiceUnavailable, ConfigError: Kafka or Postgres is down, or refuses access.
        """
        await self._write(Columns([], [], [], [], []), {})  # a missing right shows now, not after everything is read
        for offsets in ranges:
            partition_summary = Summary()
            await self._replay(offsets, partition_summary, summary)
            summary.add(partition_summary)
            on_done(offsets.partition)

    async def _replay(self, offsets: OffsetRange, partition_summary: Summary, summary: Summary) -> None:
        shares = [_Share(0, 1)]
        is_first_pass = True
        while shares:
            share, fold = shares.pop(), self._new_fold(self._max_pairs)
            self._reader.open(offsets)
            position = offsets.start
            while not self._reader.is_done:
                record_lists = await self._reader.read()
                count = -1
                while count:
                    count, share = await asyncio.to_thread(self._fold_turn, record_lists, fold, share, shares)
                    if is_first_pass:
                        partition_summary.records += count
                        self._on_read(self._reader.position - position)
                        position = self._reader.position
                    await self._continue_after(count)
            if is_first_pass:
                partition_summary.entries, partition_summary.dead = fold.entries, fold.dead
                is_first_pass = False
            self._retain(fold, share)
            await self._write_rows(fold.rows(), fold.names, partition_summary, summary)

    def _fold_turn(
        self, record_lists: Iterator[list[Record]], fold: Fold, share: _Share, other_shares: list[_Share]
    ) -> tuple[int, _Share]:
        """Fold one turn's records; return how many there were, and the share of all pairs that `fold` has now."""
        count = 0
        while count < self._pace.turn and (records := next(record_lists, None)):
            count += len(records)
            index = 0
            while index < len(records):
                index = fold.fold(records, index)
                if fold.pairs >= self._max_pairs:
                    share = self._shrink(fold, share, other_shares)
        return count, share

    def _shrink(self, fold: Fold, share: _Share, other_shares: list[_Share]) -> _Share:
        """Forget what the filter excludes, then halve the share until half the room is free; return the share."""
        self._retain(fold, share)
        while fold.pairs * 2 > self._max_pairs:
            share, other = share.halves()
            other_shares.append(other)
            fold.retain(share.includes)
        return share

    def _retain(self, fold: Fold, share: _Share) -> None:
        """Forget what the filter excludes and what belongs to another share."""
        if self._only:
            fold.retain(self._only.matches)
        if share.divisor > 1:
            fold.retain(share.includes)

    async def _write_rows(
        self, rows: Sequence[Row], names: Mapping[str, str], partition_summary: Summary, summary: Summary
    ) -> None:
        for start in range(0, len(rows), ROWS_PER_WRITE):
            part = rows[start : start + ROWS_PER_WRITE]
            columns = Columns(*(list(column) for column in zip(*part, strict=True)))
            named = names.keys() & set(columns.agent_ids)
            applied = await self._write(columns, {agent_id: names[agent_id] for agent_id in named})
            summary.changed += applied.rows
            partition_summary.pairs += len(part)
            partition_summary.undeclared += applied.undeclared
            partition_summary.refused += applied.rejected
            await self._continue_after(len(part))

    async def _continue_after(self, count: int) -> None:
        await self._pace.spend(count, self._stop)
        if self._stop.is_set():
            raise Interrupted
