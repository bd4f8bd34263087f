"""How fast a replay goes, so that live writers keep their share of Kafka and Postgres."""

from __future__ import annotations

import asyncio
from typing import Final

from pipeline.clock import Clock

# Records folded between two checks for a stop: a few milliseconds of work.
_RECORDS_PER_TURN: Final = 5000


class Pace:
    """Limits a replay to `per_second` records or rows; unused time is not saved up. None: no limit."""

    def __init__(self, per_second: float | None, clock: Clock) -> None:
        self._per_second = per_second
        self._clock = clock
        self._free_at = clock.now()

    @property
    def turn(self) -> int:
        """How much to take at once: at most a second's worth."""
        return _RECORDS_PER_TURN if self._per_second is None else max(1, min(_RECORDS_PER_TURN, int(self._per_second)))

    async def spend(self, count: int, stop: asyncio.Event) -> None:
        """Wait until `count` more may pass, or until `stop` is set."""
        if self._per_second is None or not count:
            return
        self._free_at = max(self._free_at, self._clock.now()) + count / self._per_second
        waits = [asyncio.ensure_future(self._clock.sleep_until(self._free_at)), asyncio.ensure_future(stop.wait())]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
