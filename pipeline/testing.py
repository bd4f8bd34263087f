"""For tests of programs that use this package: a manual clock, and records."""

from __future__ import annotations

import asyncio
import uuid
from datetime import datetime

from pipeline.core.record import KafkaRecord
from pipeline.core.report import Entry, Report, encode_report


class ManualClock:
    """A clock that moves only by `advance`."""

    def __init__(self, now: float = 1_704_067_200.0) -> None:
        """Start at `now`, in seconds since the Unix epoch; by default 2024-01-01T00:00:00Z."""
        self._now = now
        self._sleepers: list[tuple[float, asyncio.Future[None]]] = []

    def now(self) -> float:
        """Return the current time, in seconds since the Unix epoch."""
        return self._now

    async def sleep_until(self, deadline: float) -> None:
        """Return once `advance` has reached the deadline."""
        if deadline > self._now:
            wakes: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._sleepers.append((deadline, wakes))
            await wakes

    async def advance(self, seconds: float) -> None:
        """Advance the clock, waking sleepers in order, each at its own time, and let every woken task run."""
        target = self._now + seconds
        while due := [sleeper for sleeper in self._sleepers if sleeper[0] <= target]:
            sleeper = min(due, key=lambda item: item[0])
            self._sleepers.remove(sleeper)
            self._now = max(self._now, sleeper[0])
            if not sleeper[1].done():
                sleeper[1].set_result(None)
            await settle()
        self._now = target
        await settle()


async def settle(turns: int = 20) -> None:
    """Let the event loop's tasks run until each waits for something other than another task."""
    for _ in range(turns):
        await asyncio.sleep(0)


def record(
    offset: int,
    agent_id: uuid.UUID | str,
    collected_at: datetime | None = None,
    /,
    *,
    appended_ms: int = 1_704_067_200_000,
    **values: str,
) -> KafkaRecord:
    """Make a record whose report has the keyword arguments as keys and values."""
    report = Report(str(agent_id), [Entry(key, value) for key, value in values.items()], collected_at)
    return KafkaRecord(offset, appended_ms, str(agent_id).encode(), encode_report(report))
