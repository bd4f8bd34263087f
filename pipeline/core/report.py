"""A report: what one agent measured at one moment, as it travels on the events topic."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Final, TypeVar

import msgspec

from pipeline.core.values import MAX_ERROR_BYTES as MAX_ERROR_BYTES
from pipeline.core.values import MAX_VALUE_BYTES as MAX_VALUE_BYTES
from pipeline.core.values import as_text, limit_value, storable, utf8_length, well_formed
from pipeline.errors import DecodeError

MAX_REPORT_KEYS_BYTES: Final = 6144  # of UTF-8. Source: coder's agent API
MAX_KEY_CHARS: Final = 127  # the column is varchar(127)
MAX_AGENT_CHARS: Final = 255  # a host name has at most 253
# uuid5 of this and an agent's name is its id. It must never change: rows hold the ids.
AGENT_NAMESPACE: Final = uuid.UUID("7be3ceb6-cc9f-5329-a991-cfd51de72bc0")

# 0001-01-01T00:00:00Z: the column's default ("never collected"), and Python's and Go's earliest time.
MIN_TIMESTAMP_US: Final = -62_135_596_800_000_000
# The end of year 9999, Python's latest datetime.
MAX_TIMESTAMP_US: Final = 253_402_300_799_999_999

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# Spellings of agent ids to remember; at 188 bytes each for short names, 19 MB, and at most 1.2 kB (255 emoji), 120 MB.
MAX_KNOWN_AGENTS: Final = 100_000
# Python's own UUID() takes more for one: dashes anywhere, underscores, digits of other scripts. Those are names.
_UUID: Final = re.compile(r"(urn:uuid:)?\{?[0-9a-fA-F]{8}-?([0-9a-fA-F]{4}-?){3}[0-9a-fA-F]{12}\}?")
BACKSLASH: Final = ord("\\")
# A record this short and without escapes is within the limits: JSON is never shorter than what it encodes, and NUL
# can't be written without an escape. Only the keys' length in characters is left to check.
SHORT_BYTES: Final = min(MAX_VALUE_BYTES, MAX_ERROR_BYTES, MAX_REPORT_KEYS_BYTES)

_Parsed = TypeVar("_Parsed")
Timestamp = Annotated[datetime, msgspec.Meta(tz=True)]


class Entry(msgspec.Struct, gc=False, omit_defaults=True):
    """One metadata key of an agent with its value, or the error that came instead.

    `collected_at` overrides the report's own. Unknown fields are ignored, so that producers may be newer.
    """

    key: str
    value: str = ""
    error: str = ""
    collected_at: Timestamp | None = None


class Report(msgspec.Struct, gc=False, omit_defaults=True):
    """What one agent sent at once; without a `collected_at` the Kafka record's timestamp counts.

    `agent_id` is a UUID in any spelling, or the agent's name.
    """

    agent_id: str
    entries: list[Entry]
    collected_at: Timestamp | None = None


class AnyEntry(Entry):
    """An entry whose value, or error, may be anything; `parse_any_report` makes a text of it."""

    value: Any = ""
    error: Any = ""


class AnyReport(Report):
    """A report of such entries; its agent may be called by a number."""

    agent_id: str | int  # type: ignore[assignment]  # until parse_any_report has made a text of it
    entries: list[AnyEntry]  # type: ignore[assignment]  # a list of Entry to all who read it


# The bare parser for loops over many records: raises one of PARSE_ERRORS, and applies no limits.
parse_report: Final = msgspec.json.Decoder(Report).decode
_parse_any: Final = msgspec.json.Decoder(AnyReport).decode
PARSE_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, TypeError, RecursionError)
_encode: Final = msgspec.json.Encoder().encode


def parse_any_report(raw: bytes | str) -> AnyReport:
    """Parse a report whose values may be numbers, booleans, null, objects or lists, as text; else like parse_report."""
    return _as_texts(_parse_any(raw))


def convert_report(value: object) -> Report:
    """Make a report of an object that another format's reader has made of one, with the same fields.

    Raises:
        DecodeError: it is no report; the message is the reason for the dead letter.
    """
    if isinstance(value, dict) and isinstance(value.get("agent_id"), uuid.UUID):
        value = {**value, "agent_id": str(value["agent_id"])}
    try:
        return _as_texts(msgspec.convert(value, AnyReport))
    except PARSE_ERRORS as error:
        raise DecodeError(f"not a report: {error}") from error


def _as_texts(report: AnyReport) -> AnyReport:
    if report.agent_id.__class__ is not str:
        report.agent_id = str(report.agent_id)
    try:
        for entry in report.entries:
            if entry.value.__class__ is not str or entry.error.__class__ is not str:
                # Limited here, as the text may be longer than what it was made of: 1e15 becomes 1000000000000000.0.
                entry.value, entry.error = limit_value(as_text(entry.value), as_text(entry.error))
    except ValueError as error:  # a number of thousands of digits
        raise TypeError(str(error)) from None
    return report


def timestamp_us(moment: datetime) -> int:
    """Convert an aware datetime to microseconds since the Unix epoch, exactly, clamped to years 1 to 9999."""
    delta = moment - _EPOCH
    return clamp_us((delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds)


def moment_from_us(timestamp_us: int) -> datetime:
    """Convert microseconds since the Unix epoch to a datetime in UTC, exactly, clamped to years 1 to 9999."""
    return _EPOCH + timedelta(microseconds=clamp_us(timestamp_us))


def clamp_us(timestamp_us: int) -> int:
    """Return the nearest time in years 1 to 9999, in microseconds since the Unix epoch."""
    return min(max(timestamp_us, MIN_TIMESTAMP_US), MAX_TIMESTAMP_US)


def agent_uuid(text: str) -> str:
    """Return the id of an agent that calls itself so: a UUID in its canonical form (lower case, four dashes).

    A UUID in any spelling is itself; any other text is a name, whose id is uuid5(AGENT_NAMESPACE, name). So the id of a
    name needs no look-up, by any program.

    Raises:
        DecodeError: the text is empty, or longer than 255 characters.
    """
    return identify(text)[0]


def identify(text: str) -> tuple[str, str | None]:
    """Return an agent's id, and its name if it is called by one.

    Raises:
        DecodeError: as agent_uuid.
    """
    if not 0 < len(text) <= MAX_AGENT_CHARS:
        raise DecodeError(f"agent_id has {len(text)} characters; it must have 1 to {MAX_AGENT_CHARS}: {text[:64]!r}")
    if _UUID.fullmatch(text):
        return str(uuid.UUID(text)), None
    name = storable(text)
    return str(uuid.uuid5(AGENT_NAMESPACE, name)), name


def is_name_of(agent_id: str, text: str) -> bool:
    """Tell whether a text is what an agent calls itself: a batch of another program may say otherwise."""
    try:
        return agent_uuid(text) == agent_id
    except DecodeError:
        return False


class AgentIds:
    """Agents' ids by their spelling, so that a UUID is parsed once and not in every report; and names by id.

    Loops over many records look in `known` first, a plain dictionary, and call `learn` for what it lacks. `names` has
    the name of each agent in `known` that is called by one.
    """

    def __init__(self, *, uuids_only: bool = False) -> None:
        """Begin without any; `uuids_only`: names are refused."""
        self._uuids_only = uuids_only
        self.known: dict[str, str] = {}
        self.names: dict[str, str] = {}

    def learn(self, text: str) -> str:
        """Return the id of an agent and remember it; when 100,000 are known, forget all of them first.

        Raises:
            DecodeError: it can't be an agent's id or name.
        """
        agent_id, name = identify(text)
        if name is not None and self._uuids_only:
            raise DecodeError(f"agent_id is not a UUID: {name[:64]!r}")
        if len(self.known) >= MAX_KNOWN_AGENTS:
            self.known.clear()
            self.names.clear()
        self.known[text] = agent_id
        if name is not None:
            self.names[agent_id] = name
        return agent_id


def decode_report(raw: bytes | None) -> tuple[Report, str | None]:
    """Decode one record value; return the report and, if part of it was left out, the reason.

    Raises:
        DecodeError: see read_report.
    """
    report, problem = read_report(raw)
    if isinstance(report, AnyReport):
        entries = [Entry(*(getattr(entry, name) for name in Entry.__struct_fields__)) for entry in report.entries]
        report = Report(str(report.agent_id), entries, report.collected_at)
    return report, problem


def read_report(raw: bytes | None) -> tuple[Report, str | None]:
    """Decode as decode_report does; the report is an AnyReport if it was not plain.

    Values that are no text become text (see values.as_text). Lone surrogates and NUL become U+FFFD, which Postgres can
    store; long values and errors are cut as coder's agent API cuts them. `agent_id` keeps its spelling, and single keys
    are not checked.

    Raises:
        DecodeError: not a report; the message is the reason for the dead letter.
    """
    if raw is None:
        raise DecodeError("the record has no value (a tombstone)")
    try:
        report = parse_report(raw)
    except PARSE_ERRORS:
        try:
            report = parse_any_report(raw)
        except PARSE_ERRORS as error:
            report = parse_well_formed(parse_any_report, raw, error, "not a report")
    is_within_limits = len(raw) <= SHORT_BYTES and BACKSLASH not in raw
    return report, None if is_within_limits else apply_limits(report)


def parse_well_formed(parse: Callable[[str], _Parsed], raw: bytes, cause: Exception, what: str) -> _Parsed:
    """Parse JSON that `parse` has refused, `cause` being its reason, with U+FFFD for lone surrogates.

    msgspec refuses their escapes, which JSON's grammar allows.

    Raises:
        DecodeError: they were not the reason; the message says what the JSON is not (`what`), and why.
    """
    if b"\\u" in raw:
        try:
            return parse(well_formed(json.dumps(json.loads(raw), ensure_ascii=False)))
        except (ValueError, TypeError, RecursionError, msgspec.MsgspecError):
            pass  # the first error is more helpful
    raise DecodeError(f"{what}: {parse_problem(cause)}") from cause


def parse_problem(error: Exception) -> str:
    """Say in words why JSON, by one of PARSE_ERRORS, could not be parsed."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def apply_limits(report: Report) -> str | None:
    """Bring a report within the limits in place, as coder's agent API does; return what was left out, if anything.

    Values and errors are cut, and their `error` says so. From the entry whose key takes the sum of all keys over its
    limit, all entries are left out.
    """
    total = 0
    for index, entry in enumerate(report.entries):
        text = f"{entry.key}{entry.value}{entry.error}"
        if len(text) <= SHORT_BYTES and text.isascii() and "\0" not in text:  # the usual entry, in a fifth of the time
            total += len(entry.key)
        else:
            entry.key = storable(entry.key)
            entry.value, entry.error = limit_value(entry.value, entry.error)
            total += utf8_length(entry.key)
        if total > MAX_REPORT_KEYS_BYTES:
            left_out = len(report.entries) - index
            del report.entries[index:]
            return f"keys exceeded {MAX_REPORT_KEYS_BYTES} bytes: the last {left_out} entries were left out"
    return None


def key_problem(key: str) -> str | None:
    """Return why the table can't hold this key, or None."""
    if len(key) > MAX_KEY_CHARS:
        return f"key of {len(key)} characters exceeds {MAX_KEY_CHARS}: {key[:32]!r}..."
    return None


def encode_report(report: Report) -> bytes:
    """Encode a report as the value of a Kafka record (UTF-8 JSON)."""
    return _encode(report)
