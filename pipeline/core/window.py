"""The window of one source partition: the latest entry per (agent_id, key), folded record by record."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple

from pipeline.core.batch import Reason, Row
from pipeline.core.record import LOG_APPEND_TIME, Record
from pipeline.core.report import (
    BACKSLASH,
    MAX_TIMESTAMP_US,
    PARSE_ERRORS,
    SHORT_BYTES,
    AgentIds,
    Entry,
    apply_limits,
    decode_report,
    key_problem,
    parse_report,
    timestamp_us,
)
from pipeline.errors import DecodeError

# The capacity of a window that never fills.
UNLIMITED: Final = sys.maxsize
# Smaller reports are not measured: their pairs take a few hundred bytes, whatever they hold.
_UNMEASURED_BYTES: Final = 512
_UNMEASURED_ENTRY_BYTES: Final = 128
# What sends a record from the fast path to the careful one: it can't be used, or its agent is new.
_UNCOMMON: Final = (*PARSE_ERRORS, KeyError, DecodeError)
_Held = dict[str, tuple[datetime, Entry]]
_NEVER: Final = datetime.min.replace(tzinfo=UTC)
# Rejected records stay in memory until they are dead-lettered. Source: the size of the largest record in the events
# topic by default.
MAX_REJECTED_BYTES: Final = 1_000_000

RejectedKind = Literal["undecodable", "over_limit"]


class Rejected(NamedTuple):
    """A record to dead-letter, as all or some of its entries can't be used."""

    record: Record
    reason: str
    kind: RejectedKind = "undecodable"

    @property
    def size(self) -> int:
        """Bytes of its value."""
        return len(self.record.value or b"")


class ClosedWindow(NamedTuple):
    """A partition's data between two closes; `first` to `last` are its source offsets, both included.

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

    @property
    def is_heavy(self) -> bool:
        """Tell whether its rejected records should be written and freed before more records are folded."""
        return sum(rejected.size for rejected in self.rejected) >= MAX_REJECTED_BYTES


class OpenWindow:
    """Folds records of one partition, in offset order, keeping the latest entry per (agent_id, key).

    Guarantee: deterministic; reads no clock. An entry replaces the previous one unless it is strictly older, so on
    equal collected_at the later offset wins (metadatabatcher's rule). A report is never split between two windows.
    Memory: at most `capacity` pairs, and at most `max_bytes`, plus one report, in those of large reports.
    """

    def __init__(
        self,
        start: float,
        *,
        capacity: int,
        max_clock_skew: timedelta,
        max_bytes: int = UNLIMITED,
        agent_ids: AgentIds | None = None,
    ) -> None:
        self.start = start
        self.pairs = 0
        self.entries = 0
        self.first: int | None = None
        self.last: int = -1
        self.rejected: list[Rejected] = []
        self.clamped = 0
        self._rejected_bytes = 0
        self._capacity = capacity
        self._max_bytes = max_bytes
        self._large_bytes = 0  # an upper bound of what the pairs of large reports take
        self._max_clock_skew = max_clock_skew
        self._agents: dict[str, _Held] = {}
        agent_ids = agent_ids or AgentIds()
        self._known, self._learn = agent_ids.known, agent_ids.learn

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
        affected.
        """
        # The hot loop, one turn per entry: names are local, and rare cases are handled in methods.
        agents, known, capacity = self._agents, self._known, self._pairs_allowed
        pairs, count, index, end = self.pairs, self.entries, start, len(records)
        certain = self._certainly_believed(records[start]) if start < end else _NEVER
        while index < end and pairs < capacity:
            record = records[index]
            index += 1
            raw: Any = record.value  # None is a TypeError below
            problem = None
            try:
                report = parse_report(raw)
                agent_id = known[report.agent_id]
                if len(raw) > _UNMEASURED_BYTES or BACKSLASH in raw:
                    if len(raw) > SHORT_BYTES or BACKSLASH in raw:
                        problem = apply_limits(report)
                    if len(raw) > _UNMEASURED_ENTRY_BYTES * len(report.entries):
                        capacity = self._measure(report.entries, agents.get(agent_id))
                moment = report.collected_at
                if moment is None or moment >= certain:
                    moment = self._believe(moment, record.timestamp)
            except _UNCOMMON:
                try:
                    report, problem = decode_report(raw)
                    agent_id = self._learn(report.agent_id)
                    moment = self._believe(report.collected_at, record.timestamp)
                    if len(raw) > max(_UNMEASURED_BYTES, _UNMEASURED_ENTRY_BYTES * len(report.entries)):
                        capacity = self._measure(report.entries, agents.get(agent_id))
                except DecodeError as error:
                    capacity = self._reject(record, str(error), "undecodable")
                    continue
            held_by_key = agents.get(agent_id)
            if held_by_key is None:
                held_by_key = {}
                if report.entries:  # or new agents without entries would fill the memory uncounted
                    agents[agent_id] = held_by_key
            for entry in report.entries:
                count += 1
                at = moment
                if entry.collected_at is not None:
                    at = self._believe(entry.collected_at, record.timestamp)
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
            if self.first is None:
                self.first = records[start].offset
            self.last = records[index - 1].offset
        return index

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
        self.pairs = sum(map(len, self._agents.values()))

    def close(self, reason: Reason, end: float) -> ClosedWindow:
        """Return all that was folded, with rows sorted by (agent_id, key), as the sink needs them."""
        rows = [
            Row(agent_id, key, entry.value, entry.error, timestamp_us(at))
            for agent_id, held_by_key in sorted(self._agents.items())
            for key, (at, entry) in sorted(held_by_key.items())
        ]
        first = self.last + 1 if self.first is None else self.first
        return ClosedWindow(reason, self.start, end, first, self.last, rows, self.rejected, self.entries, self.clamped)

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

    def _certainly_believed(self, record: Record) -> datetime:
        """Return the time before which an agent's clock is believed without checking each record's own timestamp.

        With LogAppendTime all records of a record batch, hence of one fold, have the same timestamp.
        """
        if record.timestamp_type == LOG_APPEND_TIME:
            with contextlib.suppress(DecodeError):
                return self._latest_believed(record.timestamp)
        return _NEVER

    def _latest_believed(self, appended_ms: int) -> datetime:
        try:
            return _moment(appended_ms) + self._max_clock_skew
        except OverflowError:
            return _moment(appended_ms)

    def _believe(self, moment: datetime | None, appended_ms: int) -> datetime:
        """Return an agent's time, or the broker's if the agent gave none or is too far ahead of the broker.

        Raises:
            DecodeError: the record's timestamp can't be used to judge it.
        """
        if moment is not None:
            if moment <= self._latest_believed(appended_ms):
                return moment
            self.clamped += 1
        return _moment(appended_ms)


def _size(entry: Entry) -> int:
    return sys.getsizeof(entry.key) + sys.getsizeof(entry.value) + sys.getsizeof(entry.error)


def _moment(appended_ms: int) -> datetime:
    """Return a record's timestamp as a datetime.

    Raises:
        DecodeError: it is before 1970 (-1 means that Kafka has none) or after 9999.
    """
    if 0 <= appended_ms * 1000 <= MAX_TIMESTAMP_US:
        return datetime.fromtimestamp(appended_ms / 1000, UTC)
    raise DecodeError(f"the record's timestamp, {appended_ms} ms, is not in 1970 to 9999; make the topic LogAppendTime")
