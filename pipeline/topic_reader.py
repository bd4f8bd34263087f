"""Read a topic from its beginning to what it holds now, in no group: for commands, beside what runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, TopicPartition

from pipeline.errors import ServiceUnavailable, TopicMismatch

_TIMEOUT_SECONDS: Final = 10.0


def read_topic(
    client_config: Mapping[str, Any],
    topic: str,
    *,
    on_progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> Iterator[Message]:
    """Iterate the records that the topic holds when this is called, partition by partition interleaved.

    `on_progress` is told (offsets passed, offsets in all) now and then.

    Raises:
        TopicMismatch: there is no such topic.
        ServiceUnavailable: Kafka did not answer, or fell silent on the way.
    """
    consumer = Consumer(
        {
            **client_config,
            "group.id": "agent-metadata-reader",  # librdkafka wants one; it is neither joined nor committed to
            "enable.auto.commit": False,
            "enable.partition.eof": True,
        }
    )
    try:
        ranges = _ranges(consumer, topic)
        total, done = sum(end - begin for begin, end in ranges.values()), 0
        passed = {number: begin for number, (begin, _) in ranges.items()}
        unread = {number for number, (begin, end) in ranges.items() if begin < end}
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in unread])
        while unread:
            message = consumer.poll(_TIMEOUT_SECONDS)
            if message is None:
                raise ServiceUnavailable(f"Kafka sent nothing of {topic} for {_TIMEOUT_SECONDS:g} s; try again")
            number, end = message.partition(), ranges[message.partition()][1]
            error = message.error()
            if error is not None and error.code() != KafkaError._PARTITION_EOF:
                raise ServiceUnavailable(f"reading {topic} failed: {error.str()}; try again")
            if number not in unread:
                continue
            position = message.offset() + (error is None)
            if error is None and message.offset() < end:
                yield message
            done += min(position, end) - passed[number]
            passed[number] = min(position, end)
            if position >= end or error is not None:
                unread.discard(number)
            on_progress(done, total)
        on_progress(total, total)
    except KafkaException as error:
        raise ServiceUnavailable(f"reading {topic} failed: {error.args[0].str()}; is Kafka up?") from error
    finally:
        consumer.close()


def _ranges(consumer: Consumer, topic: str) -> dict[int, tuple[int, int]]:
    metadata = consumer.list_topics(topic, timeout=_TIMEOUT_SECONDS).topics[topic]
    if metadata.error is not None:
        raise TopicMismatch(f"topic {topic} can't be read: {metadata.error.str()}; `agent-metadata topics create`?")
    return {
        number: consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=_TIMEOUT_SECONDS)
        for number in metadata.partitions
    }
