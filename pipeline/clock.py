"""The one source of time, so that tests can supply their own."""

from __future__ import annotations

import asyncio
import time
from typing import Protocol


class Clock(Protocol):
    """Processing time, in seconds since the Unix epoch."""

    def now(self) -> float:
        """Return the current time; it never goes back within one process."""
        ...

    async def sleep_until(self, deadline: float) -> None:
        """Return at the deadline, within the clock's resolution; at once if it has passed."""
        ...


class SystemClock:
    """The wall clock as it was at start, advanced by the monotonic clock.

    So a step of the wall clock (NTP, an operator) neither shortens nor lengthens a window.
    """

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def now(self) -> float:
        """Return seconds since the Unix epoch."""
        return time.monotonic() + self._offset

    async def sleep_until(self, deadline: float) -> None:
        """Sleep on the running event loop."""
        await asyncio.sleep(max(0.0, deadline - self.now()))
