"""Dead letters: the headers that say why a record could not be used, and the way back from one to reports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from itertools import groupby
from typing import Final, Literal, NamedTuple

from pipeline.core.batch import Row, decode_batch, separate_unstorable, unstorable_reason
from pipeline.core.decoding import RecordDecoder, fold_loading
from pipeline.core.record import CREATE_TIME, KafkaRecord
from pipeline.core.report import Entry, Report, is_name_of
from pipeline.core.window import UNLIMITED, OpenWindow
from pipeline.errors import DecodeError, NewerVersion

Stage = Literal["worker", "sink"]
Headers = Sequence[tuple[str, bytes]]

# Kafka Connect's names, so that existing tools show and redrive these records.
_PREFIX: Final = "__connect.errors."
_MAX_MESSAGE_CHARS: Final = 1000
# How often a report has been redriven; the header stays on it if the worker dead-letters it again.
REDRIVES_HEADER: Final = "agent-metadata.redrives"


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
    """Return the original headers, followed by where and when the record was and why it was refused."""
    failure = {
        "topic": topic,
        "partition": str(partition),
        "offset": str(offset),
        "stage": stage,
        "exception.class.name": error_class,
        "exception.message": message[:_MAX_MESSAGE_CHARS],
    }
    if timestamp_ms is not None:
        failure["timestamp"] = str(timestamp_ms)
    if sqlstate is not None:
        failure["sqlstate"] = sqlstate
    return [*original, *((_PREFIX + name, text.encode()) for name, text in failure.items())]


class DeadLetter(NamedTuple):
    """A record of the dead-letter topic.

    `original` are the headers the record came with. `failure_headers` describe the failure, by name without Kafka
    Connect's prefix; of a record that was dead-lettered more than once, the last failure.
    """

    partition: int
    offset: int
    appended_ms: int
    key: bytes | None
    value: bytes | None
    original: list[tuple[str, bytes]]
    failure_headers: dict[str, str]

    @property
    def stage(self) -> str:
        """Which stage refused it: worker or sink; "unknown" if another program wrote the dead letter."""
        return self.failure_headers.get("stage", "unknown")

    @property
    def reason(self) -> str:
        """Why it was refused, with the SQLSTATE if Postgres refused it."""
        sqlstate = self.failure_headers.get("sqlstate")
        message = self.failure_headers.get("exception.message", "no reason given")
        return f"{message} (SQLSTATE {sqlstate})" if sqlstate else message

    @property
    def source(self) -> str:
        """Where the record was, as topic[partition]@offset."""
        return source_text(*(self.failure_headers.get(name, "?") for name in ("topic", "partition", "offset")))

    @property
    def agent(self) -> str:
        """The record key, which is the agent's id or name if the producer kept to the contract."""
        return (self.key or b"").decode(errors="replace")

    @property
    def redrives(self) -> int:
        """How often it has been redriven, by its headers."""
        counts = [value for name, value in self.original if name == REDRIVES_HEADER]
        return int(counts[-1]) if counts and counts[-1].isdigit() else 0

    @property
    def timestamp_ms(self) -> int:
        """When the original record was appended; if its headers do not say, when it was dead-lettered."""
        timestamp = self.failure_headers.get("timestamp", "")
        return int(timestamp) if timestamp.isdigit() else self.appended_ms


def read_dead_letter(
    *,
    partition: int,
    offset: int,
    appended_ms: int,
    key: bytes | None,
    value: bytes | None,
    headers: Headers,
) -> DeadLetter:
    """Separate the original headers of a dead-letter record from those that describe the failure."""
    original = [(name, text) for name, text in headers if not name.startswith(_PREFIX)]
    failure = {
        name.removeprefix(_PREFIX): (text or b"").decode(errors="replace")
        for name, text in headers
        if name.startswith(_PREFIX)
    }
    return DeadLetter(partition, offset, appended_ms, key, value, original, failure)


def source_text(topic: str, partition: int | str, offset: int | str) -> str:
    """Format where a record is, as topic[partition]@offset."""
    return f"{topic}[{partition}]@{offset}"


def restore(letter: DeadLetter, *, max_clock_skew: timedelta, decoder: RecordDecoder | None = None) -> list[Report]:
    """Turn a dead letter back into reports, by the worker's own rules.

    Guarantee: each entry gets the time that counted when the original record was appended (the record's, if it has
    none; no later than the clock skew allows), so an old value can't come back as new.

    Raises:
        DecodeError: it would be refused again; the message is the reason.
        ServiceUnavailable, ConfigError: the schema registry does not answer, or refuses us.
    """
    decoder = decoder or RecordDecoder()
    window = OpenWindow(0.0, capacity=UNLIMITED, max_clock_skew=max_clock_skew, decoder=decoder)
    # CreateTime, as the fold then judges the record by its own timestamp, whichever clock that was.
    original = KafkaRecord(
        letter.offset, letter.timestamp_ms, letter.key, letter.value, tuple(letter.original), CREATE_TIME
    )
    fold_loading(window, decoder, [original])
    closed = window.close("scheduled", 0.0)
    if not closed.rejected:
        return list(_reports(closed.rows, closed.names))
    if letter.stage == "sink":
        try:
            batch, unstorable = separate_unstorable(decode_batch(letter.value))
        except NewerVersion as newer:
            raise DecodeError(str(newer)) from None
        except DecodeError:
            pass  # the reason below helps more to fix it
        else:
            if unstorable:
                raise DecodeError(unstorable_reason(unstorable[0].collected_at_us[0]))
            # One report per row: an agent's keys together may exceed what one report can carry.
            return [report for row in batch.columns.rows() for report in _reports([row], batch.names)]
    raise DecodeError(closed.rejected[0].reason)


def _reports(rows: Sequence[Row], names: Mapping[str, str]) -> Iterator[Report]:
    """Make one report per agent of rows sorted by agent."""
    for agent_id, agent_rows in groupby(rows, key=lambda row: row.agent_id):
        entries = [Entry(row.key, row.value, row.error, row.collected_at) for row in agent_rows]
        name = names.get(agent_id, "")
        yield Report(name if is_name_of(agent_id, name) else agent_id, entries)


def rfc3339(timestamp_ms: int) -> str:
    """Format a Kafka timestamp as RFC 3339, to the second; "unknown" if it is none."""
    try:
        return datetime.fromtimestamp(timestamp_ms / 1000, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    except (ValueError, OverflowError, OSError):
        return "unknown"
