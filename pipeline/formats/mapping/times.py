"""Times as other programs write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, Final, Literal

import msgspec

from pipeline.core.report import Timestamp
from pipeline.errors import DecodeError

TimeFormat = Literal["rfc3339", "seconds", "milliseconds", "microseconds", "nanoseconds"]

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_NUMBER: Final = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?")


def time_reader(time_format: TimeFormat) -> Callable[[object], datetime]:
    """Return what reads a time in this format, or a datetime that is there already; it raises DecodeError.

    Numbers count from 1970 in UTC; they may be whole, fractional, or digits in a text.
    """
    if time_format == "rfc3339":
        return _rfc3339
    per_second = {"seconds": 1, "milliseconds": 1_000, "microseconds": 1_000_000, "nanoseconds": 1_000_000_000}
    micros, divisor = 1_000_000 // per_second[time_format] or 1, max(1, per_second[time_format] // 1_000_000)

    def read(value: Any) -> datetime:
        try:
            if value.__class__ is int:  # the usual case
                return _EPOCH + timedelta(0, 0, value * micros // divisor)
            if isinstance(value, datetime):
                return _aware(value)
            number = Decimal(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value
            if isinstance(number, int | float | Decimal) and not isinstance(number, bool):
                return _EPOCH + timedelta(0, 0, round(number * micros) // divisor)
        except (ArithmeticError, ValueError):
            raise DecodeError(f"{_shown(value)} {time_format} are outside the years 1 to 9999") from None
        raise DecodeError(f"{_shown(value)} is no number of {time_format} since 1970")

    return read


def _rfc3339(value: object) -> datetime:
    if isinstance(value, datetime):
        return _aware(value)
    if isinstance(value, str):
        try:
            return msgspec.convert(value, Timestamp)
        except msgspec.ValidationError:
            pass  # said below
    raise DecodeError(f"{_shown(value)} is no time in RFC 3339 with an offset, in the years 1 to 9999")


def _aware(value: datetime) -> datetime:
    if value.tzinfo is None:
        raise DecodeError(f"{value.isoformat()} is a local time, without an offset")
    return value


def _shown(value: object) -> str:
    return value[:64].__repr__() if isinstance(value, str) else f"{value}"[:64]
