"""A Kafka record as the core reads it, whichever client consumed it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

# Kafka's TimestampType: whose clock a record's timestamp is.
CREATE_TIME: Final = 0
LOG_APPEND_TIME: Final = 1


class Record(Protocol):
    """What the fold reads of a consumed record; aiokafka's own records have this shape.

    Units: `timestamp` in milliseconds since the Unix epoch.
    """

    @property
    def offset(self) -> int:
        """Its offset in the partition."""
        ...

    @property
    def timestamp(self) -> int:
        """When the broker appended it; with CreateTime, what the producer claimed."""
        ...

    @property
    def timestamp_type(self) -> int | None:
        """LOG_APPEND_TIME: the broker's clock; else the producer's."""
        ...

    @property
    def key(self) -> bytes | None:
        """The agent's id, if the producer kept to the contract."""
        ...

    @property
    def headers(self) -> Sequence[tuple[str, bytes]]:
        """Its headers; they go with it to the dead-letter topic."""
        ...

    @property
    def value(self) -> bytes | None:
        """A report in JSON."""
        ...


class KafkaRecord(NamedTuple):
    """A record as plain values, for every other source: confluent-kafka, a dead letter, a test."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    timestamp_type: int = LOG_APPEND_TIME
