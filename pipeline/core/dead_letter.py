"""Dead letters: what is said about a record that could not be used, and how reports are made of it again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Any, Final, Literal, NamedTuple

from pipeline.core.batch import Row, decode_batch
from pipeline.core.report import Entry, Report
from pipeline.core.window import OpenWindow
from pipeline.errors import DecodeError

Stage = Literal["worker", "sink"]
Headers = Sequence[tuple[str, bytes]]

# Kafka Connect's names, so that existing tools show and redrive these records.
_PREFIX: Final = "__connect.errors."
_MAX_MESSAGE_CHARS: Final = 1000
# Says on a redriven report how often it has been redriven; it comes along if the report is dead-lettered again.
REDRIVES_HEADER: Final = "agent-metadata.redrives"
# Entries, of one record: no window is closed early.
_NO_CAPACITY: Final = 1_000_000_000


def dead_letter_headers(
    *,
    topic: str,
    partition: int,
    offset: int,
    stage: Stage,
    error_class: str,
    message: str,
    timestamp_ms: int | None = None,
    sqlstate: str | None = None,
    original: Headers = (),
) -> list[tuple[str, bytes]]:
    """Return the original headers and, behind them, where and when the record was and why it was refused."""
    said = {
        "topic": topic,
        "partition": str(partition),
        "offset": str(offset),
        "stage": stage,
        "exception.class.name": error_class,
        "exception.message": message[:_MAX_MESSAGE_CHARS],
    }
    if timestamp_ms is not None:
        said["timestamp"] = str(timestamp_ms)
    if sqlstate is not None:
        said["sqlstate"] = sqlstate
    return [*original, *((_PREFIX + name, text.encode()) for name, text in said.items())]


class DeadLetter(NamedTuple):
    """A record of the dead-letter topic.

    `original`: the headers it came with. `said`: what its headers say of the failure, by name without the prefix;
    of a record that was dead-lettered more than once, the last.
    """

    partition: int
    offset: int
    appended_ms: int
    key: bytes | None
    value: bytes | None
    original: list[tuple[str, bytes]]
    said: dict[str, str]

    @property
    def stage(self) -> str:
        """Who refused it: worker or sink; "unknown" for another program's."""
        return self.said.get("stage", "unknown")

    @property
    def reason(self) -> str:
        """Why it was refused, with the SQLSTATE if it was Postgres."""
        sqlstate = self.said.get("sqlstate")
        message = self.said.get("exception.message", "no reason given")
        return f"{message} (SQLSTATE {sqlstate})" if sqlstate else message

    @property
    def source(self) -> str:
        """Where the record was, as topic[partition]@offset."""
        return source_text(*(self.said.get(name, "?") for name in ("topic", "partition", "offset")))

    @property
    def agent(self) -> str:
        """The record key, which is the agent's id where the producer kept to the contract."""
        return (self.key or b"").decode(errors="replace")

    @property
    def redrives(self) -> int:
        """How often it has been redriven, as far as its headers tell."""
        counts = [value for name, value in self.original if name == REDRIVES_HEADER]
        return int(counts[-1]) if counts and counts[-1].isdigit() else 0

    @property
    def timestamp_ms(self) -> int:
        """When the original record was appended; when it was dead-lettered, if nothing says more."""
        said = self.said.get("timestamp", "")
        return int(said) if said.isdigit() else self.appended_ms


def read_dead_letter(
    *,
    partition: int,
    offset: int,
    appended_ms: int,
    key: bytes | None,
    value: bytes | None,
    headers: Headers,
) -> DeadLetter:
    """Tell the original headers of a dead-letter record from those that say what went wrong."""
    original = [(name, text) for name, text in headers if not name.startswith(_PREFIX)]
    said = {
        name.removeprefix(_PREFIX): (text or b"").decode(errors="replace")
        for name, text in headers
        if name.startswith(_PREFIX)
    }
    return DeadLetter(partition, offset, appended_ms, key, value, original, said)


def dead_letter_of(message: Any) -> DeadLetter:
    """Read a message of the dead-letter topic, as confluent-kafka gives it."""
    return read_dead_letter(
        partition=message.partition(),
        offset=message.offset(),
        appended_ms=message.timestamp()[1],
        key=message.key(),
        value=message.value(),
        headers=message.headers() or (),
    )


def source_text(topic: str, partition: int | str, offset: int | str) -> str:
    """Write where a record is, as topic[partition]@offset."""
    return f"{topic}[{partition}]@{offset}"


class _Original(NamedTuple):
    """The original record, for the fold."""

    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None
    timestamp_type: int = 0  # whosever clock it was, it is judged by its own


def restore(letter: DeadLetter, *, max_clock_skew: timedelta) -> list[Report]:
    """Make reports of a dead letter again, by the worker's own rules at the time of the original record.

    Each entry gets the time that counted then: without one its record's, and no later than the clock skew allows.
    So an old value can't come back as new.

    Raises:
        DecodeError: it would be refused again, and why.
    """
    window = OpenWindow(0.0, capacity=_NO_CAPACITY, max_clock_skew=max_clock_skew)
    window.fold([_Original(letter.offset, letter.timestamp_ms, letter.key, letter.value)])
    closed = window.close("scheduled", 0.0)
    if not closed.rejected:
        return list(_reports(closed.rows))
    if letter.stage == "sink":
        try:
            rows = decode_batch(letter.value).columns.rows()
            # A report a row: all keys of an agent may be more than one report can carry.
            return [report for row in rows for report in _reports([row])]
        except DecodeError:
            pass  # the reason below is of more use to whoever mends it
    raise DecodeError(closed.rejected[0].reason)


def _reports(rows: Sequence[Row]) -> Iterator[Report]:
    """Make one report of an agent's rows; they are sorted by agent."""
    for agent_id, held in groupby(rows, key=lambda row: row.agent_id):
        entries = [Entry(row.key, row.value, row.error, row.collected_at) for row in held]
        yield Report(agent_id, entries)


def when(timestamp_ms: int) -> str:
    """Write a Kafka timestamp as RFC 3339, to the second; "unknown" where it is none."""
    try:
        return datetime.fromtimestamp(timestamp_ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return "unknown"
