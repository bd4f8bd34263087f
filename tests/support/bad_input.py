"""Bad input as data: what a record holds, and the rows or the reason it leads to. DESIGN.md has the table."""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime

from pipeline.core.report import Entry, Report, encode_report

# The agent of every case below; tests that need one agent per case replace it by another id of the same length.
AGENT = str(uuid.UUID(int=1))
OTHER = str(uuid.UUID(int=2))
YEAR_1 = datetime.min.replace(tzinfo=UTC)
T0 = datetime(2024, 1, 1, tzinfo=UTC)
GOOD = encode_report(Report(AGENT, [Entry("cpu", "12%"), Entry("mem", "1 GB")], T0))

NO_JSON = "not JSON: undecodable bytes, a BOM, trailing garbage, truncation; a record without a value"
NO_REPORT = "not a report: wrong types, null, no `agent_id` or `entries`, nested too deeply"
NO_AGENT = "an `agent_id` that is empty, or over 255 characters"
NAME = "an `agent_id` that is not a UUID"
SCALAR = "a value or error that is a number, a boolean, null, an object or a list"
NO_TIME = "a time without an offset, or outside the years 1 to 9999"
LONG_KEY = "a key over 127 characters"
MANY_KEYS = "keys of more than 6,144 bytes together"
LONG_TEXT = "a value or error over 2,048 bytes"
UNSTORABLE = "NUL, a lone surrogate"
AHEAD = "a time too far ahead of the broker's"
ODD_TIME = "any other time: year 1, an offset such as +14:00, nanoseconds"
TWICE = "a key twice in one report"
NEWER = "unknown fields"
EMPTY = "a report without entries"
OTHER_KEY = "a record key that is not the `agent_id`"
ABSURD_TIMESTAMP = "a record timestamp before 1970 or after 9999 (not with LogAppendTime)"


@dataclass(frozen=True)
class Case:
    """One record; `rows` is {key: (value, error, collected_at)}, None being the broker's time; `reason`, if any."""

    row: str
    value: bytes | None
    rows: dict[str, tuple[str, str, datetime | None]] = field(default_factory=dict)
    reason: str | None = None
    record_key: str = AGENT
    timestamp_ms: int | None = None
    agent: str = AGENT


def report(*entries, **more):
    return json.dumps({"agent_id": AGENT, "entries": list(entries), **more}).encode()


def of_agent(agent_id):
    return json.dumps({"agent_id": agent_id, "entries": [{"key": "k", "value": "v"}]}).encode()


def timed(collected_at):
    return report({"key": "k", "value": "v"}, collected_at=collected_at)


def too_long(size):
    return f"value of {size} bytes exceeded 2048 bytes"


CASES = [
    Case(NO_JSON, GOOD.replace(b"12%", b"\xff\xfe"), reason="can't decode byte"),
    Case(NO_JSON, b"\xef\xbb\xbf" + GOOD, reason="malformed"),
    Case(NO_JSON, GOOD + b"}", reason="trailing"),
    Case(NO_JSON, GOOD[:-1], reason="truncated"),
    Case(NO_JSON, GOOD[: GOOD.index(b"12%")] + "é".encode()[:1], reason="truncated"),
    Case(NO_JSON, GOOD.replace(b"12%", "é".encode()[:1]), reason="can't decode byte"),
    Case(NO_JSON, b"", reason="truncated"),
    Case(NO_JSON, None, reason="tombstone"),
    Case(NO_REPORT, b"null", reason="got `null`"),
    Case(NO_REPORT, b'["a report"]', reason="got `array`"),
    Case(NO_REPORT, json.dumps({"entries": []}).encode(), reason="agent_id"),
    Case(NO_REPORT, json.dumps({"agent_id": AGENT}).encode(), reason="entries"),
    Case(NO_REPORT, json.dumps({"agent_id": None, "entries": []}).encode(), reason="got `null`"),
    Case(NO_REPORT, json.dumps({"agent_id": AGENT, "entries": {"k": "v"}}).encode(), reason="Expected `array`"),
    Case(NO_REPORT, report({"value": "no key"}), reason="key"),
    Case(NO_REPORT, report({"key": None, "value": "v"}), reason="got `null`"),
    Case(NO_REPORT, report({"key": "good", "value": "v"}, {"key": 1.5, "value": "v"}), reason="got `float`"),
    Case(NO_REPORT, report({"key": "k"}, extra=None)[:-5] + b"[" * 5000 + b"]" * 5000 + b"}", reason="too deeply"),
    Case(NO_AGENT, of_agent(""), reason="has 0 characters"),
    Case(NO_AGENT, of_agent("a" * 256), reason="has 256 characters"),
    Case(NAME, of_agent("agent-7"), {"k": ("v", "", None)}, agent="agent-7"),
    Case(NAME, of_agent(7), {"k": ("v", "", None)}, agent="7"),
    Case(SCALAR, report({"key": "k", "value": 1.5, "error": None}), rows={"k": ("1.5", "", None)}),
    Case(SCALAR, report({"key": "k", "value": {"a": [True]}}), rows={"k": ('{"a":[true]}', "", None)}),
    Case(NO_TIME, timed("2024-01-01T00:00:00"), reason="timezone"),
    Case(NO_TIME, timed("yesterday"), reason="collected_at"),
    Case(NO_TIME, timed("0000-01-01T00:00:00Z"), reason="collected_at"),
    Case(NO_TIME, timed("10000-01-01T00:00:00Z"), reason="collected_at"),
    Case(
        LONG_KEY,
        report({"key": "k" * 128, "value": "v"}, {"key": "ü" * 127, "value": "w"}),
        {"ü" * 127: ("w", "", None)},
        reason="128 characters",
    ),
    Case(
        MANY_KEYS,
        report(*({"key": f"{number:06}"} for number in range(100_000))),
        {f"{number:06}": ("", "", None) for number in range(1024)},
        reason="the last 98976 entries were left out",
    ),
    Case(LONG_TEXT, report({"key": "k", "value": "x" * 5_000_000}), {"k": ("x" * 2048, too_long(5_000_000), None)}),
    Case(
        LONG_TEXT,
        report({"key": "k", "value": "a" + "é" * 1024, "error": "what the program said"}),
        {"k": ("a" + "é" * 1023, too_long(2049), None)},
    ),
    Case(
        LONG_TEXT,
        report({"key": "k", "value": "v", "error": "e" * 2049}),
        {"k": ("v", "error of 2049 bytes exceeded 2048 bytes", None)},
    ),
    Case(UNSTORABLE, report({"key": "k\0", "value": "a\0b"}), {"k\ufffd": ("a\ufffdb", "", None)}),
    Case(UNSTORABLE, report({"key": "k", "value": "\ud800", "error": "\udc00!"}), {"k": ("\ufffd", "\ufffd!", None)}),
    Case(AHEAD, timed("9999-12-31T23:59:59Z"), {"k": ("v", "", None)}),
    Case(AHEAD, timed("9999-12-31T23:59:59-14:00"), {"k": ("v", "", None)}),
    Case(
        AHEAD,
        report({"key": "k", "value": "v", "collected_at": "9999-12-31T23:59:59Z"}, collected_at="2024-01-01T00:00:00Z"),
        {"k": ("v", "", None)},
    ),
    Case(ODD_TIME, timed("0001-01-01T00:00:00Z"), {"k": ("v", "", YEAR_1)}),
    Case(ODD_TIME, timed("0001-01-01T00:00:00+14:00"), {"k": ("v", "", YEAR_1)}),
    Case(ODD_TIME, timed("2024-01-01T14:00:00+14:00"), {"k": ("v", "", T0)}),
    Case(
        ODD_TIME,
        timed("2023-12-31T23:59:59.123456789Z"),
        {"k": ("v", "", datetime(2023, 12, 31, 23, 59, 59, 123457, tzinfo=UTC))},
    ),
    Case(TWICE, report({"key": "k", "value": "first"}, {"key": "k", "value": "last"}), {"k": ("last", "", None)}),
    Case(NEWER, report({"key": "k", "value": "v", "unit": "%"}, version=9), {"k": ("v", "", None)}),
    Case(EMPTY, report()),
    Case(OTHER_KEY, report({"key": "k", "value": "v"}), {"k": ("v", "", None)}, record_key=OTHER),
    Case(ABSURD_TIMESTAMP, report({"key": "k"}), reason="timestamp", timestamp_ms=2**63 - 1),
    Case(ABSURD_TIMESTAMP, timed("2024-01-01T00:00:00Z"), reason="timestamp", timestamp_ms=2**63 - 1),
    Case(ABSURD_TIMESTAMP, timed("0001-01-01T00:00:00Z"), reason="timestamp", timestamp_ms=253_402_300_800_000),
    Case(
        ABSURD_TIMESTAMP,
        report({"key": "k", "collected_at": "2024-01-01T00:00:00Z"}),
        reason="timestamp",
        timestamp_ms=-1,
    ),
]
