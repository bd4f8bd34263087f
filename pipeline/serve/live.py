"""The current rows, in memory, for any number of watchers; no I/O, and no clock but the times its callers pass in."""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict
from collections.abc import Collection, Hashable, Iterator
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
# Bits of a DistinctCount: 1 MiB, enough for 50 million things.
_COUNT_BITS: Final = 1 << 23


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


class DistinctCount:
    """Counts different things in constant memory; exact for a few, and to about 2 % for millions.

    Source: linear counting (Whang and others, 1990): each thing sets the bit of its hash, and how many bits are still
    unset says how many things there were.
    """

    def __init__(self) -> None:
        self._bits = bytearray()
        self._unset = _COUNT_BITS

    def add(self, thing: Hashable) -> None:
        """Count a thing, unless it was counted before."""
        if not self._bits:
            self._bits = bytearray(_COUNT_BITS // 8)
        place, bit = divmod(hash(thing) % _COUNT_BITS, 8)
        if not self._bits[place] >> bit & 1:
            self._bits[place] |= 1 << bit
            self._unset = max(1, self._unset - 1)

    @property
    def count(self) -> int:
        """How many different things were added."""
        return round(-_COUNT_BITS * math.log(self._unset / _COUNT_BITS))


class LiveTable:
    """The rows and their watchers; a change finds its agent's watchers in one look-up.

    Guarantee: it holds `max_pairs` rows at most, the first that it was given. Those are kept up to date; the others are
    counted and left out.
    """

    def __init__(self, max_pairs: int) -> None:
        self.version = 0
        self._max_pairs = max_pairs
        self._left_out = DistinctCount()
        self._agents: dict[UUID, dict[str, LiveRow]] = {}
        self._names: dict[UUID, str] = {}  # of agents above whose id is no UUID
        self._by_version: OrderedDict[LiveRow, None] = OrderedDict()
        self._watchers: dict[UUID | None, set[Watcher]] = {}

    def change(
        self,
        agent_id: UUID,
        key: str,
        value: str,
        error: str,
        collected_at: datetime,
        notified_at: float | None,
        name: str | None = None,
    ) -> None:
        """Set a row; `notified_at` is in seconds since the Unix epoch, None for a row read without a notification.

        Contents that the row has already are no change. A `name` is kept once for all of its agent's rows.
        """
        row = self.row(agent_id, key)
        if row is None and len(self._by_version) >= self._max_pairs:
            self._left_out.add((agent_id, key))
            return
        if name is not None:
            self._names.setdefault(agent_id, name)
        if row is None:
            row = LiveRow(agent_id, key, collected_at)
            self._agents.setdefault(agent_id, {})[key] = row
            self._by_version[row] = None
        elif (row.value, row.error, row.collected_at) == (value, error, collected_at):
            return
        else:
            row.learn_interval(collected_at)
            self._by_version.move_to_end(row)
        self.version += 1
        row.version, row.notified_at = self.version, notified_at
        row.value, row.error, row.collected_at = value, error, collected_at
        for watchers in (self._watchers.get(agent_id, ()), self._watchers.get(None, ())):
            for watcher in watchers:
                watcher.changed.set()

    @property
    def left_out_pairs(self) -> int:
        """How many pairs are left out; to about 2 %."""
        return self._left_out.count

    def row(self, agent_id: UUID, key: str) -> LiveRow | None:
        """Return a row, or None."""
        return self._agents.get(agent_id, {}).get(key)

    def name(self, agent_id: UUID) -> str | None:
        """Return what an agent with rows calls itself, if that is no UUID."""
        return self._names.get(agent_id)

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
