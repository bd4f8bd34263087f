"""A Kafka record as the core reads it, whichever client consumed it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final, Literal, NamedTuple, Protocol

from pipeline.core.report import MAX_TIMESTAMP_US
from pipeline.errors import DecodeError

# Kafka's TimestampType: whose clock a record's timestamp is.
CREATE_TIME: Final = 0
LOG_APPEND_TIME: Final = 1

_NEVER: Final = datetime.min.replace(tzinfo=UTC)


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
        """The agent's id or name, if the producer kept to the contract."""
        ...

    @property
    def headers(self) -> Sequence[tuple[str, bytes]]:
        """Its headers; they go with it to the dead-letter topic."""
        ...

    @property
    def value(self) -> bytes | None:
        """A report, in whatever format the topic has."""
        ...


class KafkaRecord(NamedTuple):
    """A record as plain values, for every other source: confluent-kafka, a dead letter, a test."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    timestamp_type: int = LOG_APPEND_TIME


RejectedKind = Literal["undecodable", "over_limit"]


class Rejected(NamedTuple):
    """A record to dead-letter, as all or some of its entries can't be used."""

    record: Record
    reason: str
    kind: RejectedKind = "undecodable"

    @property
    def size(self) -> int:
        """Bytes of its value."""
        return len(self.record.value or b"")


class BelievedTimes:
    """Judges the times that agents give by the broker's; `clamped` counts those that were too far ahead of it."""

    def __init__(self, max_clock_skew: timedelta) -> None:
        self.clamped = 0
        self._max_clock_skew = max_clock_skew

    def certain(self, record: Record | None) -> datetime:
        """Return until when an agent is believed without asking `believe`, by the first record of a record batch.

        With LogAppendTime all records of a record batch have the same timestamp.
        """
        if record is not None and record.timestamp_type == LOG_APPEND_TIME:
            with contextlib.suppress(DecodeError):
                return self._latest(record.timestamp)
        return _NEVER

    def believe(self, moment: datetime | None, appended_ms: int) -> datetime:
        """Return an agent's time, or the broker's if the agent gave none or is too far ahead of the broker.

        Raises:
            DecodeError: the record's timestamp can't be used to judge it.
        """
        if moment is not None:
            if moment <= self._latest(appended_ms):
                return moment
            self.clamped += 1
        return _moment(appended_ms)

    def _latest(self, appended_ms: int) -> datetime:
        try:
            return _moment(appended_ms) + self._max_clock_skew
        except OverflowError:
            return _moment(appended_ms)


def _moment(appended_ms: int) -> datetime:
    """Return a record's timestamp as a datetime.

    Raises:
        DecodeError: it is before 1970 (-1 means that Kafka has none) or after 9999.
    """
    if 0 <= appended_ms * 1000 <= MAX_TIMESTAMP_US:
        return datetime.fromtimestamp(appended_ms / 1000, UTC)
    raise DecodeError(f"the record's timestamp, {appended_ms} ms, is not in 1970 to 9999; make the topic LogAppendTime")
