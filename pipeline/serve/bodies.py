"""What a request to POST /reports holds: which bodies are read, the reports in one, and what is produced of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

import msgspec
from fastapi import HTTPException, Request

from pipeline.core.report import Entry, Report, decode_report, encode_report, identify, key_problem
from pipeline.data_files import data_dir
from pipeline.errors import DecodeError

MAX_BODY_BYTES: Final = 1_048_576
# What Kafka takes in one record by default, less what surrounds it.
_MAX_REPORT_BYTES: Final = 1_000_000
_JSON: Final = "application/json"
_NDJSON: Final = ("application/x-ndjson", "application/ndjson")


class Posted(NamedTuple):
    """A report as it is produced."""

    key: bytes
    value: bytes
    entries: int


def require_readable(request: Request) -> bool:
    """Tell whether the body is NDJSON; refuse what would not be read."""
    encoding = request.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise HTTPException(
            415, f"Content-Encoding {encoding!r}: send the body as it is", {"Accept-Encoding": "identity"}
        )
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind not in (_JSON, *_NDJSON):
        raise HTTPException(415, f"Content-Type {kind!r}: must be {_JSON} or {_NDJSON[0]}")
    length = request.headers.get("Content-Length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise too_large()
    return kind != _JSON


def reports_in(body: bytes, *, is_ndjson: bool) -> Iterable[bytes]:
    """Return the reports of a body, undecoded.

    Raises:
        One of PARSE_ERRORS: it is not JSON.
    """
    return _lines(body) if is_ndjson else _items(body)


def _lines(body: bytes) -> Iterator[bytes]:
    return filter(None, map(bytes.strip, body.split(b"\n")))


def _items(body: bytes) -> Iterable[bytes]:
    """Return the reports of a JSON list undecoded, or the one report that the body is."""
    if body.lstrip()[:1] != b"[":
        msgspec.json.decode(body, type=msgspec.Raw)
        return [body]
    return map(bytes, msgspec.json.decode(body, type=list[msgspec.Raw]))


def posted(raw: bytes) -> Posted:
    """Return what is produced of a report.

    Raises:
        DecodeError: it can't be used, or not as a whole.
    """
    report, left_out = decode_report(raw)
    canonical, name = identify(report.agent_id)
    for problem in (left_out, *map(_key_problem, report.entries)):
        if problem is not None:
            raise DecodeError(problem)
    agent = name or canonical  # always spelled the same, as an agent's records need the same key
    value = encode_report(Report(agent, report.entries, report.collected_at))
    if len(value) > _MAX_REPORT_BYTES:
        raise DecodeError(f"report of {len(value)} bytes is too large for a record: send fewer keys at once")
    return Posted(agent.encode(), value, len(report.entries))


def _key_problem(entry: Entry) -> str | None:
    return key_problem(entry.key)


def too_large() -> HTTPException:
    """Return the answer to a body over the limit."""
    return HTTPException(413, f"the body exceeds {MAX_BODY_BYTES} bytes: send fewer reports at once")


def request_body() -> dict[str, Any]:
    """Describe the body for OpenAPI."""
    report = json.loads((data_dir("topics") / "report.schema.json").read_text(encoding="utf-8"))
    del report["$schema"]
    return {
        "required": True,
        "content": {
            _JSON: {"schema": {"anyOf": [report, {"type": "array", "items": report}]}},
            _NDJSON[0]: {"schema": report},
        },
    }
