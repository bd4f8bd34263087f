"""The roles with one piece of their code replaced: to check that the oracle notices, or that a stuck role ends.

`python -m tests.chaos.broken commit_first worker` runs a worker that commits source offsets before its window is safe.
What a mutant replaces is named by attribute, so a rename in the pipeline fails the import of this module.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from faust.types import TP

from pipeline.cli import main
from pipeline.kafka.chunks import PartitionChunks
from pipeline.postgres import store
from pipeline.postgres.progress import Plan
from pipeline.sink.consumer_thread import ConsumerThread
from pipeline.worker import Worker
from pipeline.worker.partition import SourcePartition
from pipeline.worker.transport import ChunkConsumerThread

GUARD = "and held.collected_at <= new.collected_at"


@dataclass(frozen=True)
class Mutant:
    """`owner`'s function `original`, to be replaced in this process."""

    owner: type | ModuleType
    original: Callable[..., Any]
    replacement: Callable[..., Any]

    def __post_init__(self) -> None:
        name = self.original.__name__
        assert getattr(self.owner, name, None) is self.original, f"{self.owner} has no {name} of its own to replace"

    def apply(self) -> None:
        setattr(self.owner, self.original.__name__, self.replacement)


_deliver = Worker._deliver
_statement = store.statement


async def _commit_and_deliver(self: Any, number: int, closed: Any) -> None:
    self._committable[TP(self._settings.events_topic, number)] = closed.last + 1
    await self._commit()
    await _deliver(self, number, closed)


def _statement_without_guard(name: str) -> str:
    text = _statement(name)
    if name == "update_rows":
        assert GUARD in text, "update_rows.sql has another guard now"
        return text.replace(GUARD, "")
    return text


def _choose_all(target: Any, received: Any, _progress: Any, _earliest: int) -> Plan:
    batches, moves = [], {}
    for offset, batch in received:
        moves[target[:2]] = offset + 1
        if batch is not None:
            batches.append(batch)
            moves[batch.source.topic_id, batch.source.partition] = batch.source.last + 1
    return Plan(batches, 0, 0, moves)


async def _wait_for_ever(*_: Any, **__: Any) -> None:
    await asyncio.Event().wait()


MUTANTS = {
    # With what keeps a promise removed.
    "commit_first": Mutant(Worker, _deliver, _commit_and_deliver),
    "no_guard": Mutant(store, _statement, _statement_without_guard),
    "aborted_read": Mutant(PartitionChunks, PartitionChunks._is_aborted, lambda *_: False),
    "no_progress_check": Mutant(store, store.choose_batches, _choose_all),
    # A consumer that delivers nothing, or an event loop that doesn't run.
    "worker_without_records": Mutant(ChunkConsumerThread, ChunkConsumerThread.getmany, _wait_for_ever),
    "worker_without_turns": Mutant(SourcePartition, SourcePartition.take, lambda *_: time.sleep(3600)),
    "sink_without_records": Mutant(ConsumerThread, ConsumerThread._deliver, lambda *_: None),
}

if __name__ == "__main__":
    MUTANTS[sys.argv.pop(1)].apply()
    main()
