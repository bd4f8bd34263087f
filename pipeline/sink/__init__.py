"""Batches topic -> Postgres, with NOTIFY.

A batch has its effect once because rows, NOTIFY and progress are one transaction; Kafka's own offsets, committed after
it, are for lag tools only.
"""

from pipeline.sink.batches_topic import BatchesTopic
from pipeline.sink.consumer import BatchConsumer
from pipeline.sink.sink import Sink
from pipeline.sink.table_watch import TableWatch

__all__ = ["BatchConsumer", "BatchesTopic", "Sink", "TableWatch"]
