"""The current rows, in memory, for any number of watchers; no I/O, and no clock but the times its callers pass in."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Final
from uuid import UUID

# A pair counts as stale at this many times its usual interval.
STALE_INTERVALS: Final = 3
# But not before this: an entry arrives a window late, and a little more.
_MIN_STALE_SECONDS: Final = 5.0
# For a pair of which only one report was seen, so that its interval is not known.
_UNKNOWN_STALE_SECONDS: Final = 180.0
# The weight of the latest interval in the usual one, which thus follows about the last five.
_WEIGHT: Final = 0.3


class LiveRow:
    """A row as it is now; `version` is the table's version at its last change."""

    __slots__ = ("agent_id", "collected_at", "error", "interval", "key", "notified_at", "value", "version")

    def __init__(self, agent_id: UUID, key: str, collected_at: datetime) -> None:
        self.agent_id = agent_id
        self.key = key
        self.value = ""
        self.error = ""
        self.collected_at = collected_at
        self.notified_at: float | None = None
        self.interval: float | None = None
        self.version = 0

    @property
    def stale_after_seconds(self) -> float:
        """The age from which this row counts as stale."""
        if self.interval is None:
            return _UNKNOWN_STALE_SECONDS
        return max(_MIN_STALE_SECONDS, STALE_INTERVALS * self.interval)

    def learn_interval(self, collected_at: datetime) -> None:
        """Average the time since the last report into the usual interval; a single long silence moves it little."""
        step = (collected_at - self.collected_at).total_seconds()
        if step <= 0:
            return
        usual = self.interval
        self.interval = step if usual is None else usual + _WEIGHT * (min(step, 2 * usual) - usual)


class Watcher:
    """What one client has seen so far, and an event that is set when there is more.

    Nothing is queued: a client that reads slowly gets the latest values when it reads, and costs no memory meanwhile.
    """

    def __init__(self, table: LiveTable, agent_ids: Collection[UUID] | None, since: int) -> None:
        self.changed = asyncio.Event()
        self.agent_ids = agent_ids
        self.seen = since
        self._table = table

    def take(self) -> list[tuple[int, LiveRow]]:
        """Return the rows that changed since the last call, each with its version, oldest change first."""
        self.changed.clear()
        rows = sorted((row.version, row) for row in self._table.newer(self.seen, self.agent_ids))
        self.seen = self._table.version
        return rows

    def rewind(self) -> None:
        """Have `take` return everything."""
        self.seen = 0


class LiveTable:
    """All rows and their watchers; a change finds its agent's watchers in one look-up."""

    def __init__(self) -> None:
        self.version = 0
        self._agents: dict[UUID, dict[str, LiveRow]] = {}
        self._by_version: OrderedDict[LiveRow, None] = OrderedDict()
        self._watchers: dict[UUID | None, set[Watcher]] = {}

    def change(
        self, agent_id: UUID, key: str, value: str, error: str, collected_at: datetime, notified_at: float | None
    ) -> None:
        """Set a row; `notified_at` is in seconds since the Unix epoch, None for a row read without a notification."""
        rows = self._agents.setdefault(agent_id, {})
        row = rows.get(key)
        if row is None:
            row = rows[key] = LiveRow(agent_id, key, collected_at)
            self._by_version[row] = None
        else:
            row.learn_interval(collected_at)
            self._by_version.move_to_end(row)
        self.version += 1
        row.version, row.notified_at = self.version, notified_at
        row.value, row.error, row.collected_at = value, error, collected_at
        for watchers in (self._watchers.get(agent_id, ()), self._watchers.get(None, ())):
            for watcher in watchers:
                watcher.changed.set()

    def row(self, agent_id: UUID, key: str) -> LiveRow | None:
        """Return a row, or None."""
        return self._agents.get(agent_id, {}).get(key)

    def newer(self, version: int, agent_ids: Collection[UUID] | None) -> Iterator[LiveRow]:
        """Iterate over the rows of some agents, or of all (None), that changed after `version`."""
        if agent_ids is None:
            for row in reversed(self._by_version):
                if row.version <= version:
                    return
                yield row
            return
        for agent_id in agent_ids:
            for row in self._agents.get(agent_id, {}).values():
                if row.version > version:
                    yield row

    def watch(self, agent_ids: Collection[UUID] | None, since: int = 0) -> Watcher:
        """Watch some agents, or all (None), from a version on, until `unwatch`."""
        watcher = Watcher(self, agent_ids, since)
        for agent_id in (None,) if agent_ids is None else agent_ids:
            self._watchers.setdefault(agent_id, set()).add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """Remove a watcher."""
        for agent_id in (None,) if watcher.agent_ids is None else watcher.agent_ids:
            watchers = self._watchers[agent_id]
            watchers.discard(watcher)
            if not watchers:
                del self._watchers[agent_id]

    def wake_all(self) -> None:
        """Wake every watcher, so that streams notice a shutdown."""
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.changed.set()

    def count(self, now: float) -> tuple[int, int]:
        """Return how many pairs there are, and how many of them are stale at `now`, in seconds since the epoch."""
        stale = sum(now - row.collected_at.timestamp() > row.stale_after_seconds for row in self._by_version)
        return len(self._by_version), stale
