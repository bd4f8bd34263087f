"""Batches topic -> Postgres, with NOTIFY.

A batch takes effect once because rows, NOTIFY and progress are one transaction: Store.apply in postgres/store.py.
Kafka's own offsets, committed after it, are for lag tools only.

    consumer_thread.py, consumer.py   the batches topic, from librdkafka's thread to the event loop
    sink.py                           a writer per partition; holds batches back while Postgres can't take them
    batches_topic.py                  where to start, and whether the topic is still the one that was read
    table_watch.py                    notices that the table was emptied
"""

from pipeline.sink.batches_topic import BatchesTopic
from pipeline.sink.consumer import BatchConsumer
from pipeline.sink.sink import Sink
from pipeline.sink.table_watch import TableWatch

__all__ = ["BatchConsumer", "BatchesTopic", "Sink", "TableWatch"]
