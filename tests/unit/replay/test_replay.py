"""The replay with a topic, a table and a clock that the test provides."""

import asyncio
import uuid
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.batch import Batch, Source, WindowSpan, encode_batch
from pipeline.core.decoding import RecordDecoder
from pipeline.core.record import KafkaRecord
from pipeline.core.report import AgentIds, Entry, Report, encode_report
from pipeline.kafka.range_reader import OffsetRange
from pipeline.postgres.store import Written
from pipeline.replay.folds import BatchesFold, EventsFold
from pipeline.replay.pace import Pace
from pipeline.replay.replay import EVERYTHING, Interrupted, PairFilter, Replay, Summary
from pipeline.testing import ManualClock, settle

T0 = datetime(2024, 1, 1, tzinfo=UTC)
T0_MS = 1_704_067_200_000
AGENTS = [str(uuid.UUID(int=number)) for number in range(6)]
KEYS = ["cpu", "mem", "disk"]


class Topic:
    """Hands out lists of three records, two at once, and now and then none."""

    def __init__(self, partitions):
        self._partitions = {
            number: [KafkaRecord(offset, T0_MS, None, raw) for offset, raw in enumerate(raws)]
            for number, raws in partitions.items()
        }
        self.opened = []
        self.ranges = [OffsetRange(number, 0, len(raws)) for number, raws in partitions.items()]
        self.position = 0
        self._end = 0
        self._turn = 0

    def open(self, offsets):
        self.opened.append(offsets.partition)
        self.position, self._end = offsets.start, offsets.end

    @property
    def is_done(self):
        return self.position >= self._end

    async def read(self):
        self._turn += 1
        return self._lists(0 if self._turn % 4 == 0 else 2)

    def _lists(self, count):
        for _ in range(count):
            start, self.position = self.position, min(self.position + 3, self._end)
            if start < self.position:
                yield self._partitions[self.opened[-1]][start : self.position]


class Table:
    """Writes what is strictly newer than its row; a dry run only counts."""

    def __init__(self, rows=(), *, is_dry=False):
        self.rows = dict(rows)
        self.calls = []
        self._is_dry = is_dry

    async def write(self, columns, _names):
        rows = list(columns.rows())
        self.calls.append(len(rows))
        older = [row for row in rows if row[:2] not in self.rows or self.rows[row[:2]][2] < row.collected_at_us]
        if not self._is_dry:
            self.rows.update({row[:2]: row[2:] for row in older})
        return Written(rows=len(older))


def us(moment):
    return (moment - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def replayed(topic, table, *, max_pairs=1000, only=EVERYTHING, new_fold=None):
    summary = Summary()

    async def job():
        replay = Replay(
            topic,
            new_fold=new_fold or partial(EventsFold, max_clock_skew=timedelta(60), decoder=RecordDecoder()),
            write=table.write,
            pace=Pace(None, ManualClock()),
            only=only,
            max_pairs=max_pairs,
        )
        await replay.run(topic.ranges, summary)

    asyncio.run(job())
    return summary


def report(agent, second, **values):
    entries = [Entry(key, value) for key, value in values.items()]
    return encode_report(Report(agent, entries, T0 + timedelta(seconds=second)))


reports = st.lists(
    st.tuples(st.sampled_from(AGENTS), st.integers(0, 5), st.dictionaries(st.sampled_from(KEYS), st.text("ab"))),
    max_size=25,
)
held = st.dictionaries(
    st.tuples(st.sampled_from(AGENTS), st.sampled_from(KEYS)),
    st.integers(0, 5).map(lambda second: ("old", "", us(T0) + second * 10**6)),
)


def keyed(some):
    """Records by partition: all of an agent's records are in one."""
    partitions = {0: [], 1: []}
    for agent, second, values in some:
        partitions[AGENTS.index(agent) % 2].append(report(agent, second, **values))
    return partitions


def plain(some, rows):
    """The rule at its plainest: newest wins, the later on a tie; a row that is as new stays."""
    newest = {}
    for agent, second, values in some:
        for key, value in values.items():
            at = us(T0 + timedelta(seconds=second))
            if (agent, key) not in newest or newest[agent, key][2] <= at:
                newest[agent, key] = (value, "", at)
    changed = {pair: row for pair, row in newest.items() if pair not in rows or rows[pair][2] < row[2]}
    return {**rows, **changed}, len(newest), len(changed)


@given(reports, held, st.integers(2, 8))
def test_replay_in_any_memory_is_the_plain_rule_and_counts_as_the_dry_run_says(some, rows, max_pairs):
    table, dry = Table(rows), Table(rows, is_dry=True)
    expected, pairs, changed = plain(some, rows)
    summary = replayed(Topic(keyed(some)), table, max_pairs=max_pairs)
    assert table.rows == expected
    assert (summary.records, summary.entries) == (len(some), sum(len(values) for *_, values in some))
    assert (summary.pairs, summary.changed, summary.already_newer) == (pairs, changed, pairs - changed)
    assert replayed(Topic(keyed(some)), dry, max_pairs=max_pairs) == summary
    assert dry.rows == rows
    again = replayed(Topic(keyed(some)), table, max_pairs=max_pairs)
    assert (again.changed, table.rows) == (0, expected)


def test_more_pairs_than_are_held_read_the_range_again_and_write_each_pair_once():
    some = [(agent, 1, dict.fromkeys(KEYS, "v")) for agent in AGENTS]
    topic, table = Topic(keyed(some)), Table()
    replayed(topic, table, max_pairs=4)
    assert topic.opened.count(0) > 1
    assert sum(table.calls) == len(AGENTS) * len(KEYS)


def test_filter_leaves_other_agents_and_keys_alone():
    some = [(agent, 1, dict.fromkeys(KEYS, "v")) for agent in AGENTS]
    table = Table()
    only = PairFilter(frozenset(AGENTS[:2]), frozenset({"cpu"}))
    summary = replayed(Topic(keyed(some)), table, max_pairs=2, only=only)
    assert set(table.rows) == {(AGENTS[0], "cpu"), (AGENTS[1], "cpu")}
    assert (summary.records, summary.pairs) == (len(AGENTS), 2)


def test_unreadable_records_are_counted_and_nothing_else_suffers():
    table = Table()
    records = [
        b"{",
        report(AGENTS[0], 1, cpu="v"),
        report("", 1, cpu="v"),
        report(AGENTS[0], 1, **{"k" * 200: "v"}),
    ]
    summary = replayed(Topic({0: records}), table)
    assert (summary.dead, summary.pairs, set(table.rows)) == (3, 1, {(AGENTS[0], "cpu")})


def test_replay_of_batches_takes_the_newest_row_of_each_pair_and_the_later_on_a_tie():
    def batch(*rows):
        columns = [list(column) for column in zip(*rows, strict=True)]
        return encode_batch(Batch(Source("events", "id", 0, 0, 0), WindowSpan(0, 1), "scheduled", 1, 1, *columns))

    records = [
        batch((AGENTS[1], "cpu", "new", "", 2), (AGENTS[1].upper(), "mem", "first", "", 1)),
        batch((AGENTS[1], "cpu", "old", "", 1), (AGENTS[1], "mem", "second", "", 1), ("no-uuid", "mem", "x", "", 1)),
        b"not a batch",
    ]
    table = Table()
    new_fold = partial(BatchesFold, agent_ids=AgentIds(uuids_only=True))
    summary = replayed(Topic({0: records}), table, new_fold=new_fold, max_pairs=2)
    assert table.rows == {(AGENTS[1], "cpu"): ("new", "", 2), (AGENTS[1], "mem"): ("second", "", 1)}
    assert (summary.records, summary.entries, summary.dead, summary.pairs) == (3, 5, 2, 2)


def test_stopped_replay_has_done_whole_partitions_and_resumes_as_one_run():
    some = [(agent, 1, dict.fromkeys(KEYS, "v")) for agent in AGENTS]
    topic, table, summary, done = Topic(keyed(some)), Table(), Summary(), []

    async def run(stop_at):
        replay = Replay(
            topic,
            new_fold=partial(EventsFold, max_clock_skew=timedelta(60), decoder=RecordDecoder()),
            write=table.write,
            pace=Pace(None, ManualClock()),
            on_read=lambda _: replay.stop() if topic.opened[-1] == stop_at else None,
        )
        await replay.run([item for item in topic.ranges if item.partition not in done], summary, done.append)

    with pytest.raises(Interrupted):
        asyncio.run(run(stop_at=1))
    assert done == [0]
    asyncio.run(run(stop_at=None))
    assert summary == replayed(Topic(keyed(some)), Table())


async def test_pace_lets_through_so_much_a_second_and_ends_at_a_stop():
    clock, stop = ManualClock(), asyncio.Event()
    pace = Pace(10, clock)
    await clock.advance(100)  # nothing is saved up
    spending = asyncio.create_task(pace.spend(20, stop))
    await settle()
    await clock.advance(1.9)
    assert not spending.done()
    await clock.advance(0.2)
    assert spending.done()
    endless = asyncio.create_task(pace.spend(10**9, stop))
    stop.set()
    await asyncio.wait_for(endless, 10)
    assert (pace.turn, Pace(None, clock).turn) == (10, 5000)
