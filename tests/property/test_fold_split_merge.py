"""Any order, duplication and partition of the same reports ends in the same rows."""

import uuid
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.batch import MAX_COLUMNS_BYTES, Row, Source, WindowSpan, decode_batch, encode_batch, merge, split
from pipeline.core.notify import MAX_PAYLOAD_BYTES, decode_agent_ids, encode_agent_id_chunks
from pipeline.core.record import KafkaRecord
from pipeline.core.report import (
    MAX_ERROR_BYTES,
    MAX_VALUE_BYTES,
    Entry,
    Report,
    decode_report,
    encode_report,
    limit_value,
)
from pipeline.core.window import OpenWindow

T0 = datetime(2024, 1, 1, tzinfo=UTC)
SOURCE = Source("events", "id", 0, 0, 0)
WINDOW = WindowSpan(0, 1)

agents = st.integers(0, 3).map(lambda number: str(uuid.UUID(int=number)))
keys = st.sampled_from(["cpu", "mem", "status"])
moments = st.integers(0, 5).map(lambda ms: T0 + timedelta(milliseconds=ms))
texts = st.text(st.characters(codec="utf-8"), max_size=20)
reports = st.builds(Report, agents, st.lists(st.builds(Entry, keys, texts, texts), max_size=4), moments)
anything = st.text(st.characters(), max_size=3000)  # lone surrogates and NUL too
rows = st.builds(Row, agents, keys, texts, texts, st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999))


def as_records(some):
    return [KafkaRecord(offset, 1_704_067_200_000, None, encode_report(report)) for offset, report in enumerate(some)]


def fold(some, *, chunk=1000, capacity=10**6):
    """Fold in chunks, closing at capacity; return the windows' rows in the order in which they closed."""
    records, closed = as_records(some), []
    window = OpenWindow(0, capacity=capacity, max_clock_skew=timedelta(60))
    for start in range(0, len(records), chunk):
        part, index = records[start : start + chunk], 0
        while index < len(part):
            index = window.fold(part, index)
            if window.is_full:
                closed.append(window.close("capacity", 1))
                window = OpenWindow(0, capacity=capacity, max_clock_skew=timedelta(60))
    return [*closed, window.close("shutdown", 1)]


def naive(some):
    """The rule at its plainest: newest wins, the later arrival on a tie."""
    newest = {}
    for report in some:
        for entry in report.entries:
            pair, held = (report.agent_id, entry.key), newest.get((report.agent_id, entry.key))
            if held is None or report.collected_at >= held[2]:
                newest[pair] = (entry.value, entry.error, report.collected_at)
    return newest


def as_table(some_rows):
    return {(row.agent_id, row.key): (row.value, row.error, row.collected_at) for row in some_rows}


@given(st.lists(reports, max_size=30), st.integers(1, 7), st.integers(1, 5), st.integers(1, 4))
def test_fold_split_merge_of_any_cut_is_the_plain_rule(some, chunk, capacity, batch_size):
    windows = fold(some, chunk=chunk, capacity=capacity)
    batches = [
        decode_batch(encode_batch(batch))
        for closed in windows
        for batch in split(
            [limit(row) for row in closed.rows],
            source=SOURCE,
            window=WINDOW,
            reason=closed.reason,
            batch_size=batch_size,
        )
    ]
    assert as_table(merge(batches).rows()) == as_table_limited(naive(some))


def limit(row):
    value, error = limit_value(row.value, row.error)
    return row._replace(value=value, error=error)


def as_table_limited(table):
    return {pair: (*limit_value(value, error), moment) for pair, (value, error, moment) in table.items()}


@given(st.lists(reports, max_size=12, unique_by=lambda report: report.collected_at), st.randoms())
def test_fold_of_distinct_times_does_not_depend_on_order_or_repetition(some, dice):
    shuffled = [*some, *some]
    dice.shuffle(shuffled)
    assert as_table(fold(shuffled)[-1].rows) == as_table(fold(some)[-1].rows)


@given(st.lists(reports, max_size=30), st.integers(1, 10))
def test_fold_ranges_of_consecutive_windows_touch(some, capacity):
    windows = [closed for closed in fold(some, capacity=capacity) if closed.last >= closed.first]
    covered = [offset for closed in windows for offset in range(closed.first, closed.last + 1)]
    assert covered == list(range(len(some)))


@given(st.lists(rows, max_size=50), st.integers(1, 20))
def test_split_puts_every_row_in_one_part_in_order(some, batch_size):
    batches = split(some, source=SOURCE, window=WINDOW, reason="scheduled", batch_size=batch_size)
    assert [row for batch in batches for row in batch.columns.rows()] == some
    assert [(batch.part, batch.parts) for batch in batches] == [
        (number, len(batches)) for number in range(1, len(batches) + 1)
    ]
    assert [batch.completes_source for batch in batches] == [False] * (len(batches) - 1) + [True] * bool(batches)
    assert all(len(batch.agent_ids) <= batch_size for batch in batches)


def test_split_keeps_parts_under_kafkas_limit_whatever_the_text():
    worst = [Row(str(uuid.UUID(int=i)), "k" * 127, "\x1f" * 2048, "\x1f" * 2048, i) for i in range(500)]
    batches = split(worst, source=SOURCE, window=WINDOW, reason="scheduled", batch_size=500)
    assert [row for batch in batches for row in batch.columns.rows()] == worst
    assert max(len(encode_batch(batch)) for batch in batches) <= MAX_COLUMNS_BYTES + 1000


@given(st.lists(rows, max_size=40), st.integers(1, 10))
def test_merge_keeps_one_row_a_pair_by_the_plain_rule(some, batch_size):
    batches = split(some, source=SOURCE, window=WINDOW, reason="scheduled", batch_size=batch_size)
    plain = {}
    for row in some:
        held = plain.get(row[:2])
        if held is None or row.collected_at_us >= held.collected_at_us:
            plain[row[:2]] = row
    assert list(merge(batches).rows()) == sorted(plain.values())


@given(reports)
def test_report_round_trips(report):
    assert decode_report(encode_report(report)) == (report_limited(report), None)


def report_limited(report):
    entries = [Entry(entry.key, *limit_value(entry.value, entry.error)) for entry in report.entries]
    return Report(report.agent_id, entries, report.collected_at)


@given(anything, anything)
def test_limited_text_is_what_postgres_takes(value, error):
    value, error = limit_value(value, error)
    assert len(value.encode()) <= MAX_VALUE_BYTES
    assert len(error.encode()) <= MAX_ERROR_BYTES
    assert "\0" not in value + error
    assert limit_value(value, error) == (value, error)


@given(st.lists(st.uuids(), max_size=1200))
def test_agent_id_payloads_round_trip_and_fit(ids):
    payloads = encode_agent_id_chunks(ids)
    assert [agent_id for payload in payloads for agent_id in decode_agent_ids(payload)] == ids
    assert all(0 < len(payload) <= MAX_PAYLOAD_BYTES for payload in payloads)
