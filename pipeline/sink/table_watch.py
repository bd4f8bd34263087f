"""Notice that the table was emptied under the sink, and have it refilled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final

import structlog

from pipeline.errors import PipelineError

CHECK_SECONDS: Final = 2.0
# After what won't mend itself, as a missing right.
_PAUSE_SECONDS: Final = 30.0

_log = structlog.get_logger(__name__)


class TableWatch:
    """Checks every two seconds; live batches are applied meanwhile, as no guard needs them to wait.

    `is_emptied()` asks Postgres; `refill()` returns what it did, or None if another process is at it.
    """

    def __init__(self, is_emptied: Callable[[], Awaitable[bool]], refill: Callable[[], Awaitable[Any]]) -> None:
        self._is_emptied = is_emptied
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
        if not await self._is_emptied():
            self.is_emptied = False
            return
        if not self.is_emptied:
            _log.warning("table_emptied", advice="it is refilled from the batches topic, as far back as that reaches")
        self.is_emptied = True
        summary = await self._refill()
        if summary is not None:
            self.is_emptied = False
            _log.info("table_refilled", rows=summary.changed, pairs=summary.pairs, records=summary.records)
