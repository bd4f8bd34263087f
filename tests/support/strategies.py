"""What the decoders are fed, and what must hold: for seconds in tests, for minutes in `make bench-fuzz`."""

from __future__ import annotations

import contextlib
import json
from typing import Any

from hypothesis import strategies as st

from pipeline.core.batch import Batch, Source, WindowSpan, decode_batch, encode_batch
from pipeline.core.report import (
    MAX_ERROR_BYTES,
    MAX_REPORT_KEYS_BYTES,
    MAX_TIMESTAMP_US,
    MAX_VALUE_BYTES,
    MIN_TIMESTAMP_US,
    apply_limits,
    decode_report,
    encode_report,
    timestamp_us,
)
from pipeline.errors import DecodeError, NewerVersion
from tests.support.bad_input import CASES, GOOD, report

GOOD_BATCH = encode_batch(
    Batch(Source("e", "id", 0, 1, 2), WindowSpan(0, 1), "scheduled", 1, 1, ["a"], ["k"], ["v"], [""], [0])
)
_FIELDS = ["agent_id", "entries", "collected_at", "key", "value", "error", "source", "keys", "version", "first"]
# All of Unicode, including NUL, lone surrogates and code points beyond 16 bits. Long ones repeat short ones.
_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)
_TEXTS = st.one_of(_TEXT, st.builds(lambda text, times: text * times, _TEXT, st.sampled_from([100, 2048, 6145])))
_ANY_TIME = r"[0-9]{1,5}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,12})?"
_GOOD_TIME = r"[0-9]{3}[1-9]-(0[1-9]|1[0-2])-(0[1-9]|1[0-9])T([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?"
_TIMES = st.from_regex(_GOOD_TIME, fullmatch=True) | st.from_regex(_ANY_TIME, fullmatch=True)
_OFFSETS = st.sampled_from(["Z", "Z", "z", "+14:00", "-14:00", "+23:59", "-23:59", "+24:00", "+99:99", "-00:00", ""])
_STAMPS = st.builds(lambda time, offset: time + offset, _TIMES, _OFFSETS)
_SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), _TEXTS, _STAMPS)
_ENTRY = st.fixed_dictionaries({"key": _TEXTS}, optional={"value": _TEXTS, "error": _TEXTS, "collected_at": _STAMPS})
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_FIELDS) | _TEXT, inner, max_size=6),
    max_leaves=12,
)
_SEEDS = [GOOD, GOOD_BATCH, *(case.value for case in CASES if case.value and len(case.value) < 20_000)]


@st.composite
def _damaged(draw: Any) -> bytes:
    """Something good, or bad in a known way, with some bytes changed, removed or inserted."""
    raw = bytearray(draw(st.sampled_from(_SEEDS)))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(raw)))
        raw[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(raw)


def _encode_json(value: Any) -> bytes:
    return json.dumps(value).encode()


_REPORTS = st.builds(
    lambda entries, more: report(*entries, **more),
    st.lists(_ENTRY, max_size=5),
    st.fixed_dictionaries({}, optional={"collected_at": _STAMPS, "agent_id2": _JSON}),
)
RECORD_VALUES = st.one_of(st.none(), st.binary(max_size=300), _damaged(), _REPORTS, _REPORTS, _JSON.map(_encode_json))


def check_decoders(raw: bytes | None) -> str:
    """Decode as a report and as a batch, raising nothing but DecodeError; the report was "decoded" or "refused"."""
    with contextlib.suppress(DecodeError, NewerVersion):
        decode_batch(raw)
    try:
        decoded, _ = decode_report(raw)
    except DecodeError:
        return "refused"
    assert sum(len(entry.key.encode()) for entry in decoded.entries) <= MAX_REPORT_KEYS_BYTES
    for entry in decoded.entries:
        assert len(entry.value.encode()) <= MAX_VALUE_BYTES
        assert len(entry.error.encode()) <= MAX_ERROR_BYTES
        assert "\0" not in entry.key + entry.value + entry.error
    for moment in (decoded.collected_at, *(entry.collected_at for entry in decoded.entries)):
        assert moment is None or MIN_TIMESTAMP_US <= timestamp_us(moment) <= MAX_TIMESTAMP_US
    # Applied twice, by the producer and by the worker, the limits change nothing more.
    assert apply_limits(decoded) is None
    assert decode_report(encode_report(decoded)) == (decoded, None)
    return "decoded"
