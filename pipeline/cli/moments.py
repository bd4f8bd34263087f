"""Times as operators write them: RFC 3339, `2h ago`, or `now`."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from pipeline.errors import ConfigError

_AGO: Final = re.compile(
    r"(\d+(?:\.\d+)?)\s*(?:(s)(?:ec(?:ond)?s?)?|(m)(?:in(?:ute)?s?)?|(h)(?:ours?)?|(d)(?:ays?)?)\s+ago", re.IGNORECASE
)
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_moment(text: str, now: datetime, *, option: str) -> datetime:
    """Parse a moment; ages count back from `now`.

    Raises:
        ConfigError: it is not a moment; the message names the option and shows what is accepted.
    """
    text = text.strip()
    if text.lower() == "now":
        return now
    try:
        if found := _AGO.fullmatch(text):
            return now - timedelta(seconds=float(found[1]) * _SECONDS[found[found.lastindex or 0].lower()])
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ConfigError(f"{option} {text!r} has no time zone: write {_example(moment)}")
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ConfigError(
            f"{option} {text!r} is not a time: write RFC 3339 ({_example(now)}), an age (90m ago), or now"
        ) from None


def _example(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
