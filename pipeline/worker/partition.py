"""One source partition in the worker: fold chunks, close windows on time, hand them on in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Protocol

from pipeline.clock import Clock
from pipeline.core.batch import Reason
from pipeline.core.window import ClosedWindow, Record

# Closed windows that may wait for Kafka's acknowledgement before the partition takes no more records; with the
# open one this bounds a partition's memory to about four times its window capacity. Behind large rejected records
# none waits: records of several MB would fill the memory.
MAX_WAITING: Final = 2


class Windows(Protocol):
    """The latest-wins table, as a partition uses it."""

    def full_end(self, now: float) -> float: ...  # noqa: D102  # see LatestTable
    def aligned_end(self, partition: int, now: float) -> float: ...  # noqa: D102
    def open(self, partition: int, now: float) -> object: ...  # noqa: D102
    def fold(self, partition: int, records: Sequence[Record], start: int) -> int: ...  # noqa: D102
    def is_full(self, partition: int) -> bool: ...  # noqa: D102
    def close(self, partition: int, reason: Reason, now: float) -> ClosedWindow: ...  # noqa: D102
    def drop(self, partition: int) -> None: ...  # noqa: D102


class SourcePartition:
    """Owns one partition's windows from assignment to revocation.

    Guarantee: closed windows are delivered one at a time, in the order in which they closed; `deliver` returns only
    when a window is safe in Kafka. If it raises, `on_failure` gets the error and nothing more is delivered.
    """

    def __init__(
        self,
        number: int,
        *,
        windows: Windows,
        clock: Clock,
        deliver: Callable[[int, ClosedWindow], Awaitable[None]],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.number = number
        self.next_offset: int | None = None  # the caller's: where the next chunk has to begin; None: not known yet
        self.appended_at = 0.0  # the caller's: when the last record before that was, in seconds since the Unix epoch
        self._windows = windows
        self._clock = clock
        self._deliver = deliver
        self._on_failure = on_failure
        self._waiting: deque[ClosedWindow] = deque()
        self._changed = asyncio.Condition()
        self._is_ending = False
        now = clock.now()
        windows.open(number, now)
        self._end = windows.full_end(now)
        self._flushing = asyncio.create_task(self._flush())
        self._tasks = [asyncio.create_task(self._close_by_clock()), self._flushing]
        for task in self._tasks:
            task.add_done_callback(self._report_failure)

    @property
    def is_held(self) -> bool:
        """Tell whether it takes no records now, because closed windows wait for Kafka's acknowledgement."""
        return len(self._waiting) > MAX_WAITING

    @property
    def unacknowledged_since(self) -> float | None:
        """When the oldest window closed that Kafka has not acknowledged yet, by this partition's clock."""
        waiting = tuple(self._waiting)  # a scrape asks from another thread
        return waiting[0].end if waiting else None

    async def take(self, records: Sequence[Record]) -> None:
        """Fold consecutive records; waits while too many closed windows are not yet safe."""
        index = 0
        while index < len(records) and not self._is_ending:
            index = self._windows.fold(self.number, records, index)
            if self._windows.is_full(self.number):
                self._end = self._windows.full_end(self._clock.now())
                await self._close("capacity")

    async def close_caught_up(self) -> None:
        """Close the open window before its time: what waited in the topic has waited long enough."""
        if self._is_ending:
            return  # the window of this number may be another owner's by now
        self._end = self._windows.aligned_end(self.number, self._clock.now())
        await self._close("scheduled")

    async def finish(self, reason: Reason) -> None:
        """Take no more records, close the open window, and return when everything is delivered, or can't be."""
        await self._end_taking()
        await self._close(reason)
        delivered = asyncio.create_task(self._until_delivered())
        try:
            await asyncio.wait([delivered, self._flushing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            delivered.cancel()

    async def abandon(self) -> None:
        """Stop at once; what was not delivered was not committed either, and will be read again."""
        await self._end_taking()
        for task in self._tasks:
            task.cancel()
        self._windows.drop(self.number)

    async def _until_delivered(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not self._waiting)

    async def _end_taking(self) -> None:
        self._is_ending = True
        async with self._changed:
            self._changed.notify_all()

    async def _close(self, reason: Reason) -> None:
        closed = self._windows.close(self.number, reason, self._clock.now())
        if closed.last < closed.first:
            return
        self._waiting.append(closed)
        most = 0 if closed.is_heavy else MAX_WAITING
        async with self._changed:
            self._changed.notify_all()
            await self._changed.wait_for(lambda: len(self._waiting) <= most or self._is_ending)

    async def _close_by_clock(self) -> None:
        while not self._is_ending:
            end = self._end
            await self._clock.sleep_until(end)
            # An early close moves the end; a sleep may wake a hair early.
            if end == self._end and self._clock.now() >= end and not self._is_ending:
                self._end = self._windows.aligned_end(self.number, self._clock.now())
                await self._close("scheduled")

    async def _flush(self) -> None:
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._waiting)
            await self._deliver(self.number, self._waiting[0])
            self._waiting.popleft()
            async with self._changed:
                self._changed.notify_all()

    def _report_failure(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)
