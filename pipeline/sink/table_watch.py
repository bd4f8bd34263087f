"""Notice that the table was emptied under the sink, and have it refilled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from pipeline.errors import PipelineError

CHECK_SECONDS: Final = 2.0
# After an error that retrying does not fix, such as a missing right.
_PAUSE_SECONDS: Final = 30.0

_log = structlog.get_logger(__name__)


class TableWatch:
    """Checks every two seconds; live batches are applied during a refill, as the guard keeps newer rows.

    `is_emptied()` asks Postgres; `refill()` returns False if another process is refilling the table already.
    """

    def __init__(self, is_emptied: Callable[[], Awaitable[bool]], refill: Callable[[], Awaitable[bool]]) -> None:
        self._ask_postgres = is_emptied
        self._refill = refill
        self.is_emptied = False

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            pause = CHECK_SECONDS
            try:
                await self._check()
            except PipelineError as error:
                if not error.retriable:
                    _log.warning("table_not_refilled", error=str(error))
                    pause = _PAUSE_SECONDS
            await asyncio.sleep(pause)

    async def _check(self) -> None:
        if not await self._ask_postgres():
            self.is_emptied = False
            return
        if not self.is_emptied:
            _log.warning("table_emptied", advice="it is refilled from the batches topic, as far back as that reaches")
        self.is_emptied = True
        self.is_emptied = not await self._refill()
