"""Live agent metadata, from a Kafka topic to Postgres and its listeners.

An agent's report takes this path; each step is a module or a folder:

    producer.py    MetadataProducer.add: a report becomes a record of the events topic
    worker/        folds events into a window, keeping the latest value of each (agent, key);
                   publishes a closed window as batches, then commits the events' offsets
    sink/          reads the batches topic from where Postgres says it is applied
    postgres/      one transaction for the batches that wait: rows that never go back, NOTIFY, progress
    listener.py    MetadataListener.changes: NOTIFY, then the rows as they are now
    serve/         the rows in memory, for any number of browsers

Besides these, replay/ writes a topic's range again, and bridge/ makes reports of what coder's own batcher writes. core/
is what they share, without I/O; roles/ are the processes that run them, jobs/ what an operator runs once, cli/ the
command.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.listener import Change, MetadataListener
    from pipeline.producer import MetadataProducer

__all__ = ["Change", "MetadataListener", "MetadataProducer"]

# Imported on first use: their client libraries take 0.8 s, which importing pipeline.testing should not cost.
_MODULES = {
    "Change": "pipeline.listener",
    "MetadataListener": "pipeline.listener",
    "MetadataProducer": "pipeline.producer",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
