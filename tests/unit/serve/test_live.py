"""Usual intervals, and what they make of a pair's age."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.serve.live import LiveTable

AGENT = uuid.UUID(int=1)
T0 = datetime(2024, 1, 1, tzinfo=UTC)


def reported_at(*seconds):
    table = LiveTable()
    for second in seconds:
        table.change(AGENT, "k", "v", "", T0 + timedelta(seconds=second), None)
    return table.row(AGENT, "k")


def test_pair_is_stale_after_three_of_its_usual_intervals():
    assert reported_at(*range(0, 600, 60)).stale_after_seconds == pytest.approx(180)


def test_pair_that_reports_fast_is_not_stale_within_five_seconds():
    assert reported_at(0, 0.1, 0.2).stale_after_seconds == 5


def test_pair_seen_once_is_stale_after_three_minutes():
    assert reported_at(0).stale_after_seconds == 180


def test_long_silence_moves_the_usual_interval_little():
    assert reported_at(0, 10, 20, 86_400).stale_after_seconds < 60


def test_interval_that_became_shorter_is_learned():
    assert reported_at(0, 60, *range(61, 90)).stale_after_seconds < 10


def test_time_that_stands_still_or_goes_back_teaches_nothing():
    assert reported_at(0, 60, 60, 30).stale_after_seconds == 180


def test_count_of_stale_pairs_is_by_each_pairs_own_interval():
    table = LiveTable()
    for key, seconds in (("often", (0, 10, 20)), ("seldom", (0, 100))):
        for second in seconds:
            table.change(AGENT, key, "v", "", T0 + timedelta(seconds=second), None)
    assert [table.count(T0.timestamp() + now) for now in (21, 51, 401)] == [(2, 0), (2, 1), (2, 2)]
