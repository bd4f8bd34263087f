"""Times as operators write them."""

from datetime import UTC, datetime, timedelta

import pytest

from pipeline.cli.moments import parse_moment
from pipeline.errors import ConfigError

NOW = datetime(2024, 1, 2, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("now", NOW),
        ("2h ago", NOW - timedelta(hours=2)),
        ("1.5 hours ago", NOW - timedelta(minutes=90)),
        ("30 min ago", NOW - timedelta(minutes=30)),
        ("10s ago", NOW - timedelta(seconds=10)),
        ("7 days ago", NOW - timedelta(days=7)),
        ("2024-01-01T00:00:00Z", datetime(2024, 1, 1, tzinfo=UTC)),
        (" 2024-01-01T02:00:00.5+02:00 ", datetime(2024, 1, 1, 0, 0, 0, 500_000, tzinfo=UTC)),
    ],
)
def test_moment_is_rfc_3339_or_an_age_or_now(text, moment):
    assert parse_moment(text, NOW, option="--from") == moment


@pytest.mark.parametrize(
    "text", ["", "yesterday", "2h", "-2h ago", "2024-13-01T00:00:00Z", "2 months ago", "9" * 20 + "d ago"]
)
def test_anything_else_is_refused_with_the_option_and_an_example(text):
    with pytest.raises(ConfigError, match=r"^--from .* is not a time: write RFC 3339 \(2024-01-02T03:04:05Z\)"):
        parse_moment(text, NOW, option="--from")


def test_time_without_a_zone_is_refused_because_it_could_be_any():
    with pytest.raises(ConfigError, match="no time zone: write 2024-01-01T10:00:00Z"):
        parse_moment("2024-01-01 10:00", NOW, option="--to")
