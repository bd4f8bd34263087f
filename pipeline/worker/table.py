"""The Faust table of latest values: one open tumbling window per source partition, without a changelog."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import faust
from faust.tables.manager import TableManager

from pipeline.core.batch import Reason
from pipeline.core.report import Entry
from pipeline.core.window import ClosedWindow, OpenWindow, Record


class LatestTable(faust.Table):
    """Latest entry per (agent_id, key) since each partition's window opened; windows are of processing time.

    Faust's own windowed table sends a changelog record per set and closes windows for one partition only. This one
    needs no changelog: source offsets are committed after the window's batch is safe, so the source topic is it.
    Windows tumble: each ends where the next begins, at a phase of its partition's own, so that the database sees
    an even load. A partition's first window, and the one after a close at capacity, last their whole length from
    their start instead (as metadatabatcher's timer does): what waits in the topic at a start folds into one window.
    """

    def __init__(
        self, app: faust.App, *, capacity: int, max_clock_skew: timedelta, partitions: int, **kwargs: Any
    ) -> None:
        super().__init__(app, partitions=partitions, **kwargs)
        self._count = partitions
        self._capacity = capacity
        self._max_clock_skew = max_clock_skew
        self._size = 0.0
        self._open: dict[int, OpenWindow] = {}
        self._known_agents: dict[int, dict[str, str]] = {}

    def tumbling(self, size: float, expires: Any = None, key_index: bool = False) -> LatestTable:
        """Set the windows' length in seconds, fractions too (Faust's own windows take whole seconds only)."""
        self._size = size
        return self

    def full_end(self, now: float) -> float:
        """Return the end of a window that opens now and lasts its whole length."""
        return now + self._size

    def aligned_end(self, partition: int, now: float) -> float:
        """Return the first end after `now` that falls on the partition's phase.

        Phases count from the epoch, so that all workers agree on them.
        """
        phase = self._size * (partition % self._count) / self._count
        end = (math.floor((now - phase) / self._size) + 1) * self._size + phase
        return end if end > now else end + self._size  # rounding

    def open(self, partition: int, now: float) -> OpenWindow:
        """Open a window; what an earlier one of this partition held is dropped."""
        window = OpenWindow(
            now,
            capacity=self._capacity,
            max_clock_skew=self._max_clock_skew,
            known=self._known_agents.setdefault(partition, {}),
        )
        self._open[partition] = window
        return window

    def fold(self, partition: int, records: Sequence[Record], start: int) -> int:
        """Fold `records[start:]` into the open window; return the index of the first one that it had no room for."""
        return self._open[partition].fold(records, start)

    def is_full(self, partition: int) -> bool:
        """Tell whether the open window has to be closed before it takes more."""
        return self._open[partition].is_full

    def close(self, partition: int, reason: Reason, now: float) -> ClosedWindow:
        """Close the open window and open the next."""
        closed = self._open[partition].close(reason, now)
        self.open(partition, now)
        return closed

    def drop(self, partition: int) -> None:
        """Forget a partition that another worker owns now."""
        self._open.pop(partition, None)
        self._known_agents.pop(partition, None)

    def open_pairs(self) -> dict[int, int]:
        """Return how many unique pairs are open, by partition."""
        return {partition: window.pairs for partition, window in self._open.items()}

    # What follows makes it a Faust table: readable as a mapping, without Faust's store and changelog.

    def __getitem__(self, pair: tuple[str, str]) -> Entry:
        for window in self._open.values():
            held = window.get(*pair)
            if held is not None:
                return held[1]
        raise KeyError(pair)

    def __len__(self) -> int:
        return sum(self.open_pairs().values())

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for window in self._open.values():
            yield from window.pairs_held()

    def __setitem__(self, pair: Any, value: Any) -> None:
        raise TypeError("a LatestTable is written by fold() only, a chunk of records at a time")

    def __delitem__(self, pair: Any) -> None:
        raise TypeError("a LatestTable's pairs leave together, by close()")

    async def on_start(self) -> None:
        """Start without declaring a changelog topic."""

    async def on_rebalance(self, *_: Any, **__: Any) -> None:
        """Do nothing: the worker closes and drops windows itself."""

    async def on_recovery_completed(self, *_: Any) -> None:
        """Do nothing: there is nothing to recover; what was not committed is read again."""


class LatestTables(TableManager):
    """A table manager for tables without changelogs: no topic to declare, to assign or to recover from."""

    def __bool__(self) -> bool:
        """Say that there is nothing to recover.

        Faust then seeks, and only then lets records flow; with tables to recover it does so the other way round, and
        records that were on their way are skipped.
        """
        return False

    def add(self, table: Any) -> Any:
        """Register a table."""
        self[table.name] = table
        return table

    async def on_start(self) -> None:
        """Start the tables and the (idle) recovery service, which ends every rebalance."""
        await self._update_channels()
        await self.recovery.start()

    async def _update_channels(self) -> None:
        self._tables_finalized.set()
        for table in self.values():
            await table.maybe_start()
        self._tables_registered.set()
