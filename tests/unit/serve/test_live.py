"""Usual intervals, and what they make of a pair's age."""

import tracemalloc
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.serve.live import DistinctCount, LiveTable

AGENT = uuid.UUID(int=1)
T0 = datetime(2024, 1, 1, tzinfo=UTC)


def reported_at(*seconds):
    table = LiveTable(10)
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
    table = LiveTable(10)
    for key, seconds in (("often", (0, 10, 20)), ("seldom", (0, 100))):
        for second in seconds:
            table.change(AGENT, key, "v", "", T0 + timedelta(seconds=second), None)
    assert [table.count(T0.timestamp() + now) for now in (21, 51, 401)] == [(2, 0), (2, 1), (2, 2)]


def change(table, number, value="v", at=T0):
    table.change(uuid.UUID(int=number), "k", value, "", at, None, f"host-{number}")


def test_full_table_keeps_its_pairs_up_to_date_and_leaves_new_ones_out():
    table = LiveTable(2)
    for number in (1, 2, 3):
        change(table, number)
    change(table, 1, "new", T0 + timedelta(seconds=1))
    change(table, 3, "new", T0 + timedelta(seconds=1))
    assert [table.row(uuid.UUID(int=number), "k").value for number in (1, 2)] == ["new", "v"]
    assert table.row(uuid.UUID(int=3), "k") is None
    assert (table.count(T0.timestamp())[0], table.left_out_pairs) == (2, 1)
    assert [row.agent_id.int for row in table.newer(0, None)] == [1, 2]
    assert [table.name(uuid.UUID(int=number)) for number in (1, 2, 3)] == ["host-1", "host-2", None]


def test_full_table_leaves_out_a_new_pair_of_an_agent_that_it_holds():
    table = LiveTable(1)
    change(table, 1)
    table.change(uuid.UUID(int=1), "other", "v", "", T0, None)
    assert (table.row(uuid.UUID(int=1), "other"), table.left_out_pairs) == (None, 1)


def test_pairs_that_are_left_out_do_not_wake_watchers():
    table = LiveTable(1)
    change(table, 1)
    watcher = table.watch(None)
    watcher.take()
    change(table, 2)
    assert not watcher.changed.is_set()


def test_pairs_left_out_cost_no_memory_each():
    table = LiveTable(1)
    change(table, 0)
    change(table, 1)  # the counter itself
    tracemalloc.start()
    try:
        for number in range(2, 50_000):
            change(table, number)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 100_000


@pytest.mark.parametrize("count", [0, 1, 10, 1000, 100_000])
def test_distinct_things_are_counted_once_and_to_one_percent(count):
    counter = DistinctCount()
    for _ in range(2):
        for number in range(count):
            counter.add((uuid.UUID(int=number), "k"))
    assert counter.count == pytest.approx(count, rel=0.01)


def test_contents_that_a_row_has_already_are_no_change():
    table = LiveTable(10)
    change(table, 1)
    watcher = table.watch(None)
    watcher.take()
    change(table, 1)
    assert (table.version, watcher.changed.is_set()) == (1, False)


def test_name_that_comes_after_its_rows_is_shown_with_their_next_change():
    table = LiveTable(10)
    table.change(AGENT, "k", "v", "", T0, None)
    table.change(AGENT, "k", "v", "", T0, None, "host-17")  # no change, and yet the name
    assert (table.version, table.name(AGENT)) == (1, "host-17")
