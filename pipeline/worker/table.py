"""The Faust table of latest values, as Faust sees it: the open windows of all partitions, without a changelog."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import faust
from faust.tables.manager import TableManager

from pipeline.core.report import Entry
from pipeline.worker.partition import SourcePartition


class LatestTable(faust.Table):
    """Latest entry per (agent_id, key) since each partition's window opened; a read-only mapping for Faust.

    Faust's own windowed table sends a changelog record per set and closes windows for one partition only. This one
    needs none: source offsets are committed after the window's batch is safe, so the source topic is the changelog.
    """

    def __init__(self, app: faust.App, *, sources: Mapping[int, SourcePartition], **kwargs: Any) -> None:
        """Make a table over `sources`, the partitions owned now, by number."""
        super().__init__(app, **kwargs)
        self._sources = sources

    def open_pairs(self) -> dict[int, int]:
        """Return how many unique pairs are open, by partition."""
        return {number: partition.window.pairs for number, partition in self._sources.items()}

    def __getitem__(self, pair: tuple[str, str]) -> Entry:
        for partition in self._sources.values():
            latest = partition.window.get(*pair)
            if latest is not None:
                return latest[1]
        raise KeyError(pair)

    def __len__(self) -> int:
        return sum(self.open_pairs().values())

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for partition in self._sources.values():
            yield from partition.window.pairs_held()

    def __setitem__(self, pair: Any, value: Any) -> None:
        raise TypeError("a LatestTable is read-only: SourcePartition folds records into it, a chunk at a time")

    def __delitem__(self, pair: Any) -> None:
        raise TypeError("a LatestTable is read-only: its pairs leave together, when their window closes")

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

        Faust then seeks before it lets records flow; with tables to recover it does so the other way round, and
        skips records that were in flight.
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
