"""Replay a range of a topic into the table: fold it partition by partition, then write what is newer than its row."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal, NamedTuple, Protocol

import msgspec

from pipeline.clock import Clock
from pipeline.core.batch import Batch, Columns, Row, decode_batch
from pipeline.core.record import Record
from pipeline.core.report import AgentIds
from pipeline.core.window import OpenWindow
from pipeline.errors import DecodeError

ReplaySource = Literal["events", "batches"]
Pair = tuple[str, str]

# Pairs held at once; at some 500 bytes a pair 250 MB, with values at their limit of 2 kB five times that.
PAIRS_HELD: Final = 500_000
# One statement and one transaction each: locks are brief, and the live sink gets in between.
ROWS_PER_WRITE: Final = 1000
# Folded between two looks at whether to stop: some milliseconds.
_RECORDS_PER_TURN: Final = 5000


class OffsetRange(Protocol):
    """Offsets `start` up to, not including, `end` of a partition."""

    @property
    def partition(self) -> int: ...  # noqa: D102
    @property
    def start(self) -> int: ...  # noqa: D102
    @property
    def end(self) -> int: ...  # noqa: D102


class Reader(Protocol):
    """What a replay asks of chunk_reader.ChunkReader."""

    @property
    def is_done(self) -> bool:
        """Tell whether the open range is read to its end."""

    @property
    def position(self) -> int:
        """The offset after the last record read, at most the range's end."""

    def open(self, partition: int, start: int, end: int) -> None:
        """Begin with offsets `start` up to, not including, `end`."""

    async def read(self) -> Iterator[list[Record]]:
        """Return the next records in lists of one record batch each, decoded as they are iterated."""


class Written(Protocol):
    """What is read of the store's answer: rows that changed, pairs without a row, rows that Postgres refused."""

    rows: int
    undeclared: int
    rejected: int


Write = Callable[[Columns], Awaitable[Written]]


class Summary(msgspec.Struct):
    """What a replay did, or what a dry run would have done.

    Units: `records` read and `entries` in them; `dead` records (or rows of batches) that can't be used; all others
    count pairs. A pair counts in each partition that has it: once, where the record key is the agent's id.
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
        """Pairs whose row is at least as new as what was replayed."""
        return max(0, self.pairs - self.changed - self.undeclared - self.refused)

    def add(self, other: Summary) -> None:
        """Add another's counts."""
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Interrupted(Exception):
    """The replay was told to stop; the partition under way is to be replayed anew."""


class Fold(Protocol):
    """The latest entry per pair of what was folded; `fold` returns the index of the first record not taken."""

    dead: int

    def fold(self, records: Sequence[Record], start: int) -> int:
        """Fold records of one record batch, from `start` on, until all are done or the capacity is reached."""

    @property
    def entries(self) -> int: ...  # noqa: D102
    @property
    def pairs(self) -> int: ...  # noqa: D102
    def retain(self, is_wanted: Callable[[str, str], bool]) -> None: ...  # noqa: D102
    def rows(self) -> list[Row]: ...  # noqa: D102


class EventsFold:
    """Folds the events topic by the worker's own rules."""

    def __init__(self, capacity: int, max_clock_skew: timedelta, agent_ids: AgentIds) -> None:
        self._window = OpenWindow(0.0, capacity=capacity, max_clock_skew=max_clock_skew, agent_ids=agent_ids)
        self.dead = 0

    def fold(self, records: Sequence[Record], start: int) -> int:
        """Fold until all are done or the capacity is reached."""
        index = self._window.fold(records, start)
        self.dead += self._window.drop_rejected()  # the worker has dead-lettered them when they were live
        return index

    @property
    def entries(self) -> int:
        """Entries folded."""
        return self._window.entries

    @property
    def pairs(self) -> int:
        """Unique pairs held."""
        return self._window.pairs

    def retain(self, is_wanted: Callable[[str, str], bool]) -> None:
        """Forget all other pairs."""
        self._window.retain(is_wanted)

    def rows(self) -> list[Row]:
        """Return the rows, sorted by pair."""
        return self._window.close("shutdown", 0.0).rows


class BatchesFold:
    """Folds the batches topic by the sink's rules."""

    def __init__(self, capacity: int, agent_ids: AgentIds) -> None:
        self._capacity = capacity
        self._agent_ids = agent_ids
        self._newest: dict[Pair, Row] = {}
        self._entries = 0
        self.dead = 0

    def fold(self, records: Sequence[Record], start: int) -> int:
        """Fold until all are done or the capacity is reached."""
        for index in range(start, len(records)):
            if len(self._newest) >= self._capacity:
                return index
            try:
                self._take(decode_batch(records[index].value))
            except DecodeError:
                self.dead += 1  # the sink has dead-lettered it
        return len(records)

    def _take(self, batch: Batch) -> None:
        newest, known = self._newest, self._agent_ids.known
        self._entries += len(batch.agent_ids)
        for text, key, value, error, collected_at_us in zip(*batch.columns, strict=True):
            try:
                agent_id = known.get(text) or self._agent_ids.learn(text)
            except DecodeError:
                self.dead += 1
                continue
            held = newest.get((agent_id, key))
            if held is None or collected_at_us >= held.collected_at_us:
                newest[agent_id, key] = Row(agent_id, key, value, error, collected_at_us)

    @property
    def entries(self) -> int:
        """Rows of the batches folded."""
        return self._entries

    @property
    def pairs(self) -> int:
        """Unique pairs held."""
        return len(self._newest)

    def retain(self, is_wanted: Callable[[str, str], bool]) -> None:
        """Forget all other pairs."""
        self._newest = {pair: row for pair, row in self._newest.items() if is_wanted(*pair)}

    def rows(self) -> list[Row]:
        """Return the rows, sorted by pair."""
        return sorted(self._newest.values())


class _Share(NamedTuple):
    """A share of all pairs: those whose checksum leaves `remainder` when divided by `divisor`."""

    remainder: int
    divisor: int

    def holds(self, agent_id: str, key: str) -> bool:
        return zlib.crc32(f"{agent_id}/{key}".encode(errors="replace")) % self.divisor == self.remainder

    def halves(self) -> tuple[_Share, _Share]:
        return _Share(self.remainder, self.divisor * 2), _Share(self.remainder + self.divisor, self.divisor * 2)


@dataclass(frozen=True)
class Filter:
    """Which pairs to replay; empty is all."""

    agent_ids: frozenset[str] = frozenset()
    keys: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.agent_ids or self.keys)

    def holds(self, agent_id: str, key: str) -> bool:
        """Tell whether a pair is to be replayed."""
        return (not self.agent_ids or agent_id in self.agent_ids) and (not self.keys or key in self.keys)


EVERYTHING: Final = Filter()


class Pace:
    """Lets through so much a second, and not all at once what was saved up; None is no limit."""

    def __init__(self, per_second: float | None, clock: Clock) -> None:
        self._per_second = per_second
        self._clock = clock
        self._free_at = clock.now()

    @property
    def turn(self) -> int:
        """How much to take at once, so that a second is not spent in one go."""
        return _RECORDS_PER_TURN if self._per_second is None else max(1, min(_RECORDS_PER_TURN, int(self._per_second)))

    async def spend(self, count: int, stop: asyncio.Event) -> None:
        """Wait until so much more may go, or `stop` is set."""
        if self._per_second is None or not count:
            return
        self._free_at = max(self._free_at, self._clock.now()) + count / self._per_second
        waits = [asyncio.ensure_future(self._clock.sleep_until(self._free_at)), asyncio.ensure_future(stop.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()


class Replay:
    """Replays offset ranges, one partition after the other.

    A partition's pairs are written once, when its range is read, each with its latest entry. So a tie is decided as
    the live pipeline decides it, counts are exact, and a partition that was interrupted is simply replayed anew. Where
    they are more than `pairs_held`, the range is read several times, each time for a share of the pairs.

    `new_fold(capacity)` makes an empty fold; `write` is the store's, for at most 1,000 rows a call.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        new_fold: Callable[[int], Fold],
        write: Write,
        pace: Pace,
        only: Filter = EVERYTHING,
        pairs_held: int = PAIRS_HELD,
        on_read: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Make a replay; `on_read(records)` is told how many more records were read.

        Raises:
            ValueError: fewer than two pairs can't be shared out.
        """
        if pairs_held < 2:
            raise ValueError("pairs_held must be at least 2")
        self._reader = reader
        self._new_fold = new_fold
        self._write = write
        self._pace = pace
        self._only = only
        self._pairs_held = pairs_held
        self._on_read = on_read
        self._stop = asyncio.Event()

    def stop(self) -> None:
        """Have `run` end with Interrupted, soon."""
        self._stop.set()

    async def run(self, ranges: Iterable[OffsetRange], summary: Summary, done: Callable[[int], None]) -> None:
        """Replay, adding to `summary`; `done(partition)` is called when a partition is written.

        Rows that changed count at once, everything else when the partition is done: so counts are right as well when
        an interrupted partition is replayed anew.

        Raises:
            Interrupted: by `stop`.
            ServiceUnavailable, ConfigError: Kafka or Postgres is away, or refuses us.
        """
        await self._write(Columns([], [], [], [], []))  # a want of rights is said now, and not after all is read
        for wanted in ranges:
            found = Summary()
            await self._replay(wanted, found, summary)
            summary.add(found)
            done(wanted.partition)

    async def _replay(self, wanted: OffsetRange, found: Summary, summary: Summary) -> None:
        shares = [_Share(0, 1)]
        is_first = True
        while shares:
            own, fold = shares.pop(), self._new_fold(self._pairs_held)
            self._reader.open(wanted.partition, wanted.start, wanted.end)
            position = wanted.start
            while not self._reader.is_done:
                lists = await self._reader.read()
                count = -1
                while count:
                    count, own = await asyncio.to_thread(self._fold_some, lists, fold, own, shares)
                    if is_first:
                        found.records += count
                        self._on_read(self._reader.position - position)
                        position = self._reader.position
                    await self._go_on(count)
            if is_first:
                found.entries, found.dead, is_first = fold.entries, fold.dead, False
            self._retain(fold, own)
            await self._write_rows(fold.rows(), found, summary)

    def _fold_some(
        self, lists: Iterator[list[Record]], fold: Fold, own: _Share, others: list[_Share]
    ) -> tuple[int, _Share]:
        """Fold one turn's records; return how many they were, and the share of all pairs that is held now."""
        count = 0
        while count < self._pace.turn and (records := next(lists, None)):
            count += len(records)
            index = 0
            while index < len(records):
                index = fold.fold(records, index)
                if fold.pairs >= self._pairs_held:
                    own = self._shrink(fold, own, others)
        return count, own

    def _shrink(self, fold: Fold, own: _Share, others: list[_Share]) -> _Share:
        """Forget what is not wanted, and halve the own share until half the room is free again."""
        self._retain(fold, own)
        while fold.pairs * 2 > self._pairs_held:
            own, other = own.halves()
            others.append(other)
            fold.retain(own.holds)
        return own

    def _retain(self, fold: Fold, own: _Share) -> None:
        """Forget what the filter leaves out, and what another share has."""
        if self._only:
            fold.retain(self._only.holds)
        if own.divisor > 1:
            fold.retain(own.holds)

    async def _write_rows(self, rows: Sequence[Row], found: Summary, summary: Summary) -> None:
        for start in range(0, len(rows), ROWS_PER_WRITE):
            part = rows[start : start + ROWS_PER_WRITE]
            written = await self._write(Columns(*(list(column) for column in zip(*part, strict=True))))
            summary.changed += written.rows
            found.pairs += len(part)
            found.undeclared += written.undeclared
            found.refused += written.rejected
            await self._go_on(len(part))

    async def _go_on(self, count: int) -> None:
        await self._pace.spend(count, self._stop)
        if self._stop.is_set():
            raise Interrupted
