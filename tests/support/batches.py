"""Batches that no worker made, written to the batches topic."""

from __future__ import annotations

import json
from typing import Any

from confluent_kafka import Producer

from pipeline.core.batch import Batch, Row, Source, WindowSpan, encode_batch
from pipeline.settings import Settings


def a_batch(*rows: Row, first: int, last: int | None = None, topic_id: str = "events-id", **changes: Any) -> bytes:
    """Encode a batch of these rows that covers source offsets `first` to `last`; `changes` are fields of its JSON."""
    source = Source("events", topic_id, 0, first, first if last is None else last)
    columns = [list(column) for column in zip(*rows, strict=True)]
    batch = json.loads(encode_batch(Batch(source, WindowSpan(0, 1), "scheduled", 1, 1, *columns)))
    return json.dumps({**batch, **changes}).encode()


def produce_batches(settings: Settings, *values: bytes, partition: int = 0) -> None:
    producer = Producer(settings.client_config())
    for value in values:
        producer.produce(settings.batches_topic, value, partition=partition)
    assert producer.flush(30) == 0
