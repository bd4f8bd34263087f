"""A consumer's lag behind the end of its topic, in records and in time, and whether the consumer is stuck."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NamedTuple

from pipeline.clock import Clock
from pipeline.errors import ANSWER_SECONDS, PipelineError

LOOK_SECONDS: Final = 2.0


class Position(NamedTuple):
    """How far one partition is read.

    `next_offset` is the first offset that is not finished, `reached` the first that the consumer has not handed over;
    records between them wait in this process. `not_before` is a time, in seconds since the Unix epoch, at or after
    which the record at `next_offset` was appended; 0 = unknown.
    """

    next_offset: int
    reached: int
    not_before: float = 0.0


class Lag(NamedTuple):
    """How many records of a partition are unfinished; `since` when the oldest has waited, in Unix epoch seconds.

    `uncommitted` more wait in Kafka, in or behind a transaction that has been open since `uncommitted_since`.
    """

    records: int
    since: float
    uncommitted: int = 0
    uncommitted_since: float = 0.0


class LagWatch:
    """Compares, every 2 seconds, how far partitions are read with where they end, as Kafka itself reports it.

    `positions()` returns those of the partitions owned now, `offsets(partitions)` asks Kafka for (earliest, last
    stable, end) and raises a PipelineError if there is no answer, `is_held()` tells whether the consumer waits on
    purpose (for acknowledgements, or for Postgres), and `show` gets the lags after each check.

    Stuck means: Kafka answers, records wait, nothing holds the consumer back, and yet a partition has not moved for
    `stuck_seconds` of such checks. So an outage, however long, never counts as stuck, nor does an open transaction:
    Kafka keeps back what follows its beginning, the last stable offset.
    """

    def __init__(
        self,
        *,
        positions: Callable[[], Mapping[int, Position]],
        offsets: Callable[[Sequence[int]], Awaitable[Mapping[int, tuple[int, int, int]]]],
        is_held: Callable[[], bool],
        show: Callable[[Mapping[int, Lag]], None],
        clock: Clock,
        stuck_seconds: float,
    ) -> None:
        self._positions = positions
        self._offsets = offsets
        self._is_held = is_held
        self._show = show
        self._clock = clock
        self._stuck_seconds = stuck_seconds
        self._reached: dict[int, int] = {}
        self._still_seconds: dict[int, float] = {}
        self._first_seen: dict[int, float] = {}
        self._nothing_waited_at: dict[int, float] = {}
        self._transactions: dict[int, tuple[int, float]] = {}  # where the first open one begins, and since when
        self._looked_at = clock.now()
        self._stuck: str | None = None
        self._unavailable_since: float | None = None
        self._answers_since: float | None = None

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self.look()
            await self._clock.sleep_until(self._clock.now() + LOOK_SECONDS)

    async def look(self) -> None:
        """Look once; waits at most 10 seconds for Kafka."""
        asked_at = self._clock.now()
        # A process that was suspended for an hour has not watched its consumer stand still for an hour.
        elapsed = min(asked_at - self._looked_at, LOOK_SECONDS + ANSWER_SECONDS)
        self._looked_at = asked_at
        positions = self._positions()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                # Asked without partitions too: then it matters most whether Kafka answers. Any partition will do.
                offsets = await self._offsets(sorted(positions) or [0])
        except (PipelineError, TimeoutError):
            self._unavailable_since = self._unavailable_since or asked_at
            self._answers_since = None
            self._still_seconds.clear()  # a partition that doesn't move now waits for Kafka
            self._stuck = None
            return
        self._unavailable_since = None
        self._answers_since = self._answers_since or asked_at
        lags = {}
        for partition in positions.keys() & offsets.keys():
            position, (earliest, stable, end) = positions[partition], offsets[partition]
            self._time_standstill(partition, position, max(earliest, position.reached) < stable, elapsed)
            open_since = self._open_since(partition, stable, end, asked_at)
            lag = self._lag(partition, position, earliest, stable, asked_at)
            lags[partition] = lag._replace(uncommitted=end - stable, uncommitted_since=open_since)
        for by_partition in (
            self._reached,
            self._still_seconds,
            self._first_seen,
            self._nothing_waited_at,
            self._transactions,
        ):
            for partition in by_partition.keys() - lags.keys():
                del by_partition[partition]
        self._stuck = self._why_stuck(lags)
        self._show(lags)

    def why_stuck(self) -> str | None:
        """Say which partition has not moved for too long, as of the last look."""
        return self._stuck

    def why_unavailable(self) -> str | None:
        """Say for how long Kafka has not answered, if it doesn't."""
        return (
            f"Kafka has not answered for {self.seconds_unavailable():.0f} s"
            if self._unavailable_since is not None
            else None
        )

    def seconds_unavailable(self) -> float:
        """Return for how long Kafka has not answered; 0 if it does."""
        return 0.0 if self._unavailable_since is None else self._clock.now() - self._unavailable_since

    def seconds_answering(self) -> float:
        """Return for how long Kafka has answered every look; 0 if it doesn't now."""
        return 0.0 if self._answers_since is None else self._clock.now() - self._answers_since

    def _time_standstill(self, partition: int, position: Position, is_behind: bool, elapsed: float) -> None:
        has_moved = self._reached.get(partition) != position.reached
        self._reached[partition] = position.reached
        if has_moved or not is_behind or self._is_held():
            self._still_seconds.pop(partition, None)
        elif partition in self._still_seconds:
            self._still_seconds[partition] += elapsed
        if is_behind:
            self._still_seconds.setdefault(partition, 0.0)

    def _open_since(self, partition: int, stable: int, end: int, asked_at: float) -> float:
        if stable == end:
            self._transactions.pop(partition, None)
            return 0.0
        if self._transactions.get(partition, (-1, 0.0))[0] != stable:
            self._transactions[partition] = (stable, asked_at)
        return self._transactions[partition][1]

    def _lag(self, partition: int, position: Position, earliest: int, end: int, asked_at: float) -> Lag:
        records = max(0, end - max(position.next_offset, earliest))  # below the earliest there is nothing left to read
        if not records:
            self._nothing_waited_at[partition] = asked_at
        first_seen = self._first_seen.setdefault(partition, asked_at)
        since = max(position.not_before, self._nothing_waited_at.get(partition, 0.0))
        return Lag(records, since or first_seen)

    def _why_stuck(self, lags: Mapping[int, Lag]) -> str | None:
        for partition, seconds in self._still_seconds.items():
            if seconds > self._stuck_seconds:
                return (
                    f"the consumer is stuck: of partition {partition}, where {lags[partition].records} records wait, "
                    f"it has read none for {seconds:.0f} s although Kafka answers"
                )
        return None
