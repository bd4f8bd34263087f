"""Runs a role with one of the promises' keepers taken out, to see that the harness notices.

`python -m tests.chaos.broken commit_first worker` commits source offsets before the window is safe.
"""

from __future__ import annotations

import sys
from typing import Any

from faust.types import TP

from pipeline.cli import main
from pipeline.postgres import store
from pipeline.worker import Worker

GUARD = "and held.collected_at <= new.collected_at"


def commit_first() -> None:
    deliver = Worker._deliver

    async def commit_and_deliver(self: Any, number: int, closed: Any) -> None:
        self._committable[TP(self._settings.events_topic, number)] = closed.last + 1
        await self._commit()
        await deliver(self, number, closed)

    Worker._deliver = commit_and_deliver  # type: ignore[method-assign]


def no_guard() -> None:
    statement = store.statement

    def without_guard(name: str) -> str:
        text = statement(name)
        if name == "update_rows":
            assert GUARD in text
            return text.replace(GUARD, "")
        return text

    store.statement = without_guard  # type: ignore[assignment]


def no_progress_check() -> None:
    def choose_all(target: Any, received: Any, reached: Any, applied: Any, earliest: int) -> None:
        for offset, batch in received:
            reached[target[:2]] = offset + 1
            if batch is not None:
                applied.batches.append(batch)
                reached[batch.source.topic_id, batch.source.partition] = batch.source.last + 1

    store._choose = choose_all


BROKEN = {broken.__name__: broken for broken in (commit_first, no_guard, no_progress_check)}

if __name__ == "__main__":
    BROKEN[sys.argv.pop(1)]()
    main()
