"""Batches topic -> Postgres, with NOTIFY.

A batch has its effect once because rows, NOTIFY and progress are one transaction; Kafka's own offsets, committed after
it, are for lag tools only.
"""

from pipeline.sink.sink import Sink

__all__ = ["Sink"]
