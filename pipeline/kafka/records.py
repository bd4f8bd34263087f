"""Messages of confluent-kafka as the core's records."""

from __future__ import annotations

from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Message

from pipeline.core.dead_letter import DeadLetter, read_dead_letter
from pipeline.core.record import CREATE_TIME, LOG_APPEND_TIME, KafkaRecord


def as_record(message: Message) -> KafkaRecord:
    """Convert a consumed message to the record that the fold reads."""
    clock, timestamp_ms = message.timestamp()
    return KafkaRecord(
        message.offset(),
        timestamp_ms,
        message.key(),
        message.value(),
        tuple(message.headers() or ()),
        LOG_APPEND_TIME if clock == TIMESTAMP_LOG_APPEND_TIME else CREATE_TIME,
    )


def dead_letter_of(message: Message) -> DeadLetter:
    """Convert a message of the dead-letter topic."""
    record = as_record(message)
    return read_dead_letter(
        partition=message.partition(),
        offset=record.offset,
        appended_ms=record.timestamp,
        key=record.key,
        value=record.value,
        headers=record.headers,
    )
