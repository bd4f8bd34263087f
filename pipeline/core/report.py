"""A report: what one agent measured at one moment, as it travels on the events topic."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import Annotated, Final

import msgspec

from pipeline.errors import DecodeError

# Source of the limits: coder's agent API (coderd/agentapi/metadata.go); all but the last in bytes of UTF-8.
MAX_VALUE_BYTES: Final = 2048
MAX_ERROR_BYTES: Final = 2048
MAX_REPORT_KEYS_BYTES: Final = 6144
MAX_KEY_CHARS: Final = 127  # the column is varchar(127)

# 0001-01-01T00:00:00Z: the column's default ("never collected"), and Python's and Go's earliest time.
MIN_TIMESTAMP_US: Final = -62_135_596_800_000_000
# The end of year 9999, Python's latest datetime.
MAX_TIMESTAMP_US: Final = 253_402_300_799_999_999

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# Spellings of agent ids to remember; at about 200 bytes each, 20 MB.
MAX_KNOWN_AGENTS: Final = 100_000
BACKSLASH: Final = ord("\\")
_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
# A record this short and without escapes is within the limits: JSON is never shorter than what it encodes, and NUL
# can't be written without an escape. Only the keys' length in characters is left to check.
SHORT_BYTES: Final = min(MAX_VALUE_BYTES, MAX_ERROR_BYTES, MAX_REPORT_KEYS_BYTES)

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
    """What one agent sent at once; without a `collected_at` the Kafka record's timestamp counts."""

    agent_id: str
    entries: list[Entry]
    collected_at: Timestamp | None = None


_decoder: Final = msgspec.json.Decoder(Report)
# The bare parser for loops over many records: raises one of PARSE_ERRORS, and applies no limits.
parse_report: Final = _decoder.decode
PARSE_ERRORS: Final = (msgspec.MsgspecError, UnicodeDecodeError, TypeError, RecursionError)
_encode: Final = msgspec.json.Encoder().encode


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


def canonical_agent_id(text: str) -> str:
    """Return the UUID in its canonical form: lower case, four dashes.

    Raises:
        DecodeError: not a UUID.
    """
    try:
        return str(uuid.UUID(text))
    except ValueError:
        raise DecodeError(f"agent_id is not a UUID: {text[:64]!r}") from None


class AgentIds:
    """Canonical agent ids by their spelling, so that a UUID is parsed once and not in every report.

    Loops over many records look in `known` first, a plain dictionary, and call `learn` for what it lacks.
    """

    def __init__(self) -> None:
        self.known: dict[str, str] = {}

    def learn(self, text: str) -> str:
        """Return the canonical form of a spelling and remember it; when 100,000 are known, forget all of them first.

        Raises:
            DecodeError: not a UUID.
        """
        agent_id = canonical_agent_id(text)
        if len(self.known) >= MAX_KNOWN_AGENTS:
            self.known.clear()
        self.known[text] = agent_id
        return agent_id


def decode_report(raw: bytes | None) -> tuple[Report, str | None]:
    """Decode one record value; return the report and, if part of it was left out, the reason.

    Lone surrogates and NUL become U+FFFD, which Postgres can store; long values and errors are cut as coder's
    agent API cuts them. `agent_id` keeps its spelling, and single keys are not checked.

    Raises:
        DecodeError: not a report; the message is the reason for the dead letter.
    """
    if raw is None:
        raise DecodeError("the record has no value (a tombstone)")
    try:
        report = parse_report(raw)
    except PARSE_ERRORS as error:
        report = _decode_with_lone_surrogates(raw, error)
    is_within_limits = len(raw) <= SHORT_BYTES and BACKSLASH not in raw
    return report, None if is_within_limits else apply_limits(report)


def _decode_with_lone_surrogates(raw: bytes, cause: Exception) -> Report:
    """Decode text with lone surrogate escapes, which msgspec refuses though JSON's grammar allows them."""
    if b"\\u" in raw:
        try:
            text = json.dumps(json.loads(raw), ensure_ascii=False)
            well_formed = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
            return _decoder.decode(well_formed)
        except (ValueError, RecursionError, msgspec.MsgspecError):
            pass  # the first error is more helpful
    reason = "nested too deeply" if isinstance(cause, RecursionError) else str(cause)
    raise DecodeError(f"not a report: {reason}") from cause


def apply_limits(report: Report) -> str | None:
    """Bring a report within the limits in place, as coder's agent API does; return what was left out, if anything.

    Values and errors are cut, and their `error` says so. From the entry whose key takes the sum of all keys over its
    limit, all entries are left out.
    """
    total = 0
    for index, entry in enumerate(report.entries):
        entry.key = _storable(entry.key)
        entry.value, entry.error = limit_value(entry.value, entry.error)
        total += _utf8_length(entry.key)
        if total > MAX_REPORT_KEYS_BYTES:
            left_out = len(report.entries) - index
            del report.entries[index:]
            return f"keys exceeded {MAX_REPORT_KEYS_BYTES} bytes: the last {left_out} entries were left out"
    return None


def limit_value(value: str, error: str) -> tuple[str, str]:
    """Return value and error within their limits, storable by Postgres.

    Guarantee: a value is cut at a character boundary, at most three bytes below the limit.
    Source: the error texts are coder's (coderd/agentapi/metadata.go); its dashboards show them.
    """
    value, error = _storable(value), _storable(error)
    value_bytes, error_bytes = _utf8_length(value), _utf8_length(error)
    if value_bytes > MAX_VALUE_BYTES:
        value = value.encode()[:MAX_VALUE_BYTES].decode(errors="ignore")
        error = f"value of {value_bytes} bytes exceeded {MAX_VALUE_BYTES} bytes"
    if error_bytes > MAX_ERROR_BYTES:
        error = f"error of {error_bytes} bytes exceeded {MAX_ERROR_BYTES} bytes"
    return value, error


def key_problem(key: str) -> str | None:
    """Return why the table can't hold this key, or None."""
    if len(key) > MAX_KEY_CHARS:
        return f"key of {len(key)} characters exceeds {MAX_KEY_CHARS}: {key[:32]!r}..."
    return None


def encode_report(report: Report) -> bytes:
    """Encode a report as the value of a Kafka record (UTF-8 JSON)."""
    return _encode(report)


def _utf8_length(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _storable(text: str) -> str:
    if "\0" in text:
        text = text.replace("\0", _REPLACEMENT)
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
