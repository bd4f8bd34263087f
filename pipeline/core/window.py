"""The window of one source partition: the latest entry per (agent_id, key), folded record by record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple

from pipeline.core.batch import Reason, Row
from pipeline.core.decoding import NOT_PLAIN, RecordDecoder, SchemaId, SchemaNeeded
from pipeline.core.record import BelievedTimes, Record, Rejected, RejectedKind
from pipeline.core.report import (
    BACKSLASH,
    SHORT_BYTES,
    Entry,
    Report,
    apply_limits,
    key_problem,
    timestamp_us,
)
from pipeline.errors import DecodeError

# The capacity of a window that never fills.
UNLIMITED: Final = sys.maxsize
# Smaller reports are not measured: their pairs take a few hundred bytes.
_UNMEASURED_BYTES: Final = 512
_UNMEASURED_ENTRY_BYTES: Final = 128  # of JSON
_UNMEASURED_TEXT_BYTES: Final = 256  # in memory, where three empty texts take 150
_Held = dict[str, tuple[datetime, Entry]]
# Rejected records stay in memory until they are dead-lettered. Source: a topic's largest record by default.
MAX_REJECTED_BYTES: Final = 1_000_000


class ClosedWindow(NamedTuple):
    """A partition's data between two closes; `first` to `last` are its source offsets, both included.

    `names` has, by id, the names of agents in `rows` that are called by one.
    Units: `start` and `end` in seconds since the Unix epoch.
    """

    reason: Reason
    start: float
    end: float
    first: int
    last: int
    rows: list[Row]
    rejected: list[Rejected]
    entries: int
    clamped: int
    names: dict[str, str]

    @property
    def is_heavy(self) -> bool:
        """Tell whether its rejected records should be written and freed before more records are folded."""
        return sum(rejected.size for rejected in self.rejected) >= MAX_REJECTED_BYTES


class OpenWindow:
    """Folds records of one partition, in offset order, keeping the latest entry per (agent_id, key).

    Guarantee: deterministic; reads no clock. An entry replaces the previous one unless it is strictly older, so on
    equal collected_at the later offset wins (metadatabatcher's rule). A record is never split between two windows.
    `names` has, by id, the names of its agents that are called by one.
    Memory: at most `capacity` pairs, and at most `max_bytes`, plus one record, in those of large reports.
    """

    def __init__(
        self,
        start: float,
        *,
        capacity: int,
        max_clock_skew: timedelta,
        max_bytes: int = UNLIMITED,
        decoder: RecordDecoder | None = None,
    ) -> None:
        self.start = start
        self.pairs = 0
        self.entries = 0
        self.first: int | None = None
        self.last: int = -1
        self.rejected: list[Rejected] = []
        self.schema_needed: SchemaId | None = None
        self._rejected_bytes = 0
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._large_bytes = 0  # an upper bound of what the pairs of large reports take
        self._times = BelievedTimes(max_clock_skew)
        self._agents: dict[str, _Held] = {}
        self.names: dict[str, str] = {}
        self._decoder = decoder or RecordDecoder()
        self._decoder.reset()

    @property
    def is_full(self) -> bool:
        """Tell whether the window has reached its capacity of pairs or bytes and must be closed before it takes more.

        A rejected record counts as a pair, as it stays in memory too. MAX_REJECTED_BYTES of them fill any window.
        """
        return self.pairs >= self._pairs_allowed

    def get(self, agent_id: str, key: str) -> tuple[datetime, Entry] | None:
        """Return (collected_at, entry) of a pair, or None."""
        return self._agents.get(agent_id, {}).get(key)

    def pairs_held(self) -> Iterator[tuple[str, str]]:
        """Iterate over the (agent_id, key) pairs."""
        for agent_id, held_by_key in self._agents.items():
            for key in held_by_key:
                yield agent_id, key

    def fold(self, records: Sequence[Record], start: int = 0) -> int:  # noqa: C901  # calls would cost more than the work
        """Fold `records[start:]` until all are done or the window is full; return the index of the next one.

        Shape: `records` are of one record batch. One that can't be used goes to `rejected`; the others are not
        affected. It also ends in front of a record for which `schema_needed` is to be loaded, and is None otherwise.
        """
        # The hot loop, one turn per entry: names are local, and rare cases are handled in methods.
        agents, capacity, parse, ids = self._agents, self._pairs_allowed, self._decoder.parse, self._decoder.agent_ids
        known, learn, names = ids.known, ids.learn, ids.names
        pairs, count, index, end = self.pairs, self.entries, start, len(records)
        believe, certain = self._times.believe, self._times.certain(records[start] if start < end else None)
        self.schema_needed = None
        while index < end and pairs < capacity:
            record = records[index]
            raw: Any = record.value  # None is a TypeError below
            problem = None
            try:
                report = parse(raw)
                try:
                    agent_id = known[report.agent_id]
                except KeyError:  # a new agent; this costs nothing for the others
                    agent_id = learn(report.agent_id)
                if len(raw) > _UNMEASURED_BYTES or BACKSLASH in raw:
                    if len(raw) > SHORT_BYTES or BACKSLASH in raw:
                        problem = apply_limits(report)
                    if len(raw) > _UNMEASURED_ENTRY_BYTES * len(report.entries):
                        capacity = self._measure(report.entries, agents.get(agent_id))
                moment = report.collected_at
                if moment is None or moment >= certain:
                    moment = believe(moment, record.timestamp)
            except NOT_PLAIN:
                self.pairs, self.entries = pairs, count
                capacity = self._fold_carefully(record)
                if self.schema_needed is not None:
                    break
                pairs, count, parse = self.pairs, self.entries, self._decoder.parse
                index += 1
                continue
            index += 1
            held_by_key = agents.get(agent_id)
            if held_by_key is None:
                held_by_key = {}
                if report.entries:  # or new agents without entries would fill the memory uncounted
                    agents[agent_id] = held_by_key
                    if names:
                        self._note_name(agent_id)
            for entry in report.entries:
                count += 1
                at = moment
                if entry.collected_at is not None:
                    at = believe(entry.collected_at, record.timestamp)
                key = entry.key
                held = held_by_key.get(key)
                if held is None:
                    if key_refused := key_problem(key):
                        problem = key_refused
                        continue
                    pairs += 1
                elif at < held[0]:
                    continue
                held_by_key[key] = (at, entry)
            if problem is not None:
                capacity = self._reject(record, problem, "over_limit")
        self.pairs, self.entries = pairs, count
        if index > start:
            self.first = records[start].offset if self.first is None else self.first
            self.last = records[index - 1].offset
        return index

    def _fold_carefully(self, record: Record) -> int:
        """Fold a record that is not plain: with several reports, or bad; return what _reject returns."""
        try:
            reports, problem = self._decoder.decode(record)
        except SchemaNeeded as needed:
            self.schema_needed = needed.schema_id
            return self._pairs_allowed
        except DecodeError as error:
            return self._reject(record, str(error), "undecodable")
        taken = 0
        for report in reports:
            try:
                problem = self._put(report, record) or problem
                taken += 1
            except DecodeError as error:
                problem = str(error)
        if problem is not None:
            return self._reject(record, problem, "over_limit" if taken else "undecodable")
        return self._pairs_allowed

    def _put(self, report: Report, record: Record) -> str | None:
        """Fold a report as `fold` does; return why part of it was left out, if it was.

        Raises:
            DecodeError: all of it is left out, for this reason.
        """
        agent_ids = self._decoder.agent_ids
        agent_id = agent_ids.known.get(report.agent_id) or agent_ids.learn(report.agent_id)
        moment = self._times.believe(report.collected_at, record.timestamp)
        if sum(map(_size, report.entries)) > max(_UNMEASURED_BYTES, _UNMEASURED_TEXT_BYTES * len(report.entries)):
            self._measure(report.entries, self._agents.get(agent_id))
        problem = None
        for entry in report.entries:
            self.entries += 1
            if refused := key_problem(entry.key):
                problem = refused
                continue
            at = moment if entry.collected_at is None else self._times.believe(entry.collected_at, record.timestamp)
            held_by_key = self._agents.setdefault(agent_id, {})
            held = held_by_key.get(entry.key)
            if held is None or at >= held[0]:
                self.pairs += held is None
                held_by_key[entry.key] = (at, entry)
        if agent_id in self._agents:
            self._note_name(agent_id)
        return problem

    def _note_name(self, agent_id: str) -> None:
        if name := self._decoder.agent_ids.names.get(agent_id):
            self.names[agent_id] = name

    def reject(self, record: Record, reason: str) -> None:
        """Keep a record for the dead-letter topic that can't even be folded."""
        self._reject(record, reason, "undecodable")
        self.pass_over(record.offset, record.offset + 1)

    def pass_over(self, start: int, next_offset: int) -> None:
        """Let the source range cover offsets without a record to fold: of aborted transactions, markers, compaction."""
        if self.first is None:
            self.first = start
        self.last = next_offset - 1

    def drop_rejected(self) -> int:
        """Forget the rejected records and return how many there were, for readers that only count them."""
        count = len(self.rejected)
        self.rejected.clear()
        self._rejected_bytes = 0
        return count

    def retain(self, keep: Callable[[str, str], bool]) -> None:
        """Forget every pair but those that `keep(agent_id, key)` accepts, for readers of a part."""
        kept = {
            agent_id: {key: held for key, held in held_by_key.items() if keep(agent_id, key)}
            for agent_id, held_by_key in self._agents.items()
        }
        self._agents = {agent_id: held_by_key for agent_id, held_by_key in kept.items() if held_by_key}
        self.names = {agent_id: name for agent_id, name in self.names.items() if agent_id in self._agents}
        self.pairs = sum(map(len, self._agents.values()))

    def close(self, reason: Reason, end: float) -> ClosedWindow:
        """Return all that was folded, with rows sorted by (agent_id, key), as the sink needs them."""
        rows = [
            Row(agent_id, key, entry.value, entry.error, timestamp_us(at))
            for agent_id, held_by_key in sorted(self._agents.items())
            for key, (at, entry) in sorted(held_by_key.items())
        ]
        offsets = self.last + 1 if self.first is None else self.first, self.last
        counts = self.entries, self._times.clamped
        return ClosedWindow(reason, self.start, end, *offsets, rows, self.rejected, *counts, self.names)

    @property
    def _pairs_allowed(self) -> int:
        if self._rejected_bytes >= MAX_REJECTED_BYTES or self._large_bytes >= self._max_bytes:
            return 0
        return self._capacity - len(self.rejected)

    def _measure(self, entries: Sequence[Entry], held_by_key: _Held | None) -> int:
        """Count the memory that a large report will add; return how many pairs the window may now have.

        What it replaces is taken off up to its own size only, because an older entry replaces nothing. At the limit the
        count, then too high, is made anew, and a window that is three quarters full is left full.
        """
        for entry in entries:
            held = held_by_key.get(entry.key) if held_by_key else None
            self._large_bytes += max(0, _size(entry) - (_size(held[1]) if held else 0))
        if self._large_bytes >= self._max_bytes:
            size = sum(_size(entry) for held_by_key in self._agents.values() for _, entry in held_by_key.values())
            self._large_bytes = size if size < self._max_bytes * 3 // 4 else self._max_bytes
        return self._pairs_allowed

    def _reject(self, record: Record, reason: str, kind: RejectedKind) -> int:
        """Keep a record for the dead-letter topic; return how many pairs the window may now have."""
        rejected = Rejected(record, reason, kind)
        self.rejected.append(rejected)
        self._rejected_bytes += rejected.size
        return self._pairs_allowed


def _size(entry: Entry) -> int:
    return sys.getsizeof(entry.key) + sys.getsizeof(entry.value) + sys.getsizeof(entry.error)
