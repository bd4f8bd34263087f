"""A message of confluent-kafka as the fold reads it."""

from typing import NamedTuple

from confluent_kafka import Message


class _R(NamedTuple):
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    timestamp_type: int = 0


def as_record(message: Message) -> _R:
    """X."""
    return _R(message.offset(), message.timestamp()[1], message.key(), message.value(), tuple(message.headers() or ()))
