"""The rows as they are now, in memory, for any number of watchers; no I/O, and no clock but what its caller brings."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Collection, Iterator
from datetime import datetime
from typing import Final
from uuid import UUID

# A pair counts as stale when it is this many times as old as its usual interval.
STALE_INTERVALS: Final = 3
# A pair is not called stale sooner: arrival takes a window and some more.
_LEAST_STALE_SECONDS: Final = 5.0
# As long as only one report of a pair was seen, nobody knows its interval: then after this.
_UNKNOWN_STALE_SECONDS: Final = 180.0
# The weight of the latest interval in the usual one: some five intervals decide.
_WEIGHT: Final = 0.3


class LiveRow:
    """A row as it is now. `version` says when it changed last, in the table's own count."""

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
        return max(_LEAST_STALE_SECONDS, STALE_INTERVALS * self.interval)

    def learn_interval(self, collected_at: datetime) -> None:
        """Take the time since the last report into the usual interval; one long silence moves it little."""
        step = (collected_at - self.collected_at).total_seconds()
        if step <= 0:
            return
        usual = self.interval
        self.interval = step if usual is None else usual + _WEIGHT * (min(step, 2 * usual) - usual)


class Watcher:
    """What one client has seen so far, and an event that tells of more.

    It queues nothing: a client that reads slowly gets the latest values when it does, and costs no memory meanwhile.
    """

    def __init__(self, table: LiveTable, agent_ids: Collection[UUID] | None, since: int) -> None:
        self.changed = asyncio.Event()
        self.agent_ids = agent_ids
        self.seen = since
        self._table = table

    def take(self) -> list[tuple[int, LiveRow]]:
        """Return the rows that changed since the last call, each with its version, the oldest change first."""
        self.changed.clear()
        rows = sorted((row.version, row) for row in self._table.newer(self.seen, self.agent_ids))
        self.seen = self._table.version
        return rows

    def rewind(self) -> None:
        """Have `take` return everything."""
        self.seen = 0


class LiveTable:
    """All rows, and who watches them. A change reaches its agent's watchers by one look-up."""

    def __init__(self) -> None:
        self.version = 0
        self._agents: dict[UUID, dict[str, LiveRow]] = {}
        self._by_version: OrderedDict[LiveRow, None] = OrderedDict()
        self._watchers: dict[UUID | None, set[Watcher]] = {}

    def change(
        self, agent_id: UUID, key: str, value: str, error: str, collected_at: datetime, notified_at: float | None
    ) -> None:
        """Take a row as it is now; `notified_at` is in seconds since the Unix epoch, None for a row that was read."""
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
        for watched in (agent_id, None):
            for watcher in self._watchers.get(watched, ()):
                watcher.changed.set()

    def row(self, agent_id: UUID, key: str) -> LiveRow | None:
        """Return one row, if there is one."""
        return self._agents.get(agent_id, {}).get(key)

    def newer(self, version: int, agent_ids: Collection[UUID] | None) -> Iterator[LiveRow]:
        """Iterate the rows, of some agents or of all (None), that changed after `version`."""
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
        """Watch some agents, or all (None), from a version on; `unwatch` ends it."""
        watcher = Watcher(self, agent_ids, since)
        for watched in (None,) if agent_ids is None else agent_ids:
            self._watchers.setdefault(watched, set()).add(watcher)
        return watcher

    def unwatch(self, watcher: Watcher) -> None:
        """Forget a watcher."""
        for watched in (None,) if watcher.agent_ids is None else watcher.agent_ids:
            watchers = self._watchers[watched]
            watchers.discard(watcher)
            if not watchers:
                del self._watchers[watched]

    def wake_all(self) -> None:
        """Wake every watcher, for the end."""
        for watchers in self._watchers.values():
            for watcher in watchers:
                watcher.changed.set()

    def count(self, now: float) -> tuple[int, int]:
        """Return how many pairs there are, and how many of them are stale at `now`, in seconds since the epoch."""
        stale = sum(now - row.collected_at.timestamp() > row.stale_after_seconds for row in self._by_version)
        return len(self._by_version), stale
