"""Lag, its age, and what counts as stuck, on a clock and with offsets that the test controls."""

import pytest

from pipeline.errors import ServiceUnavailable
from pipeline.monitoring.lag import LOOK_SECONDS, LagWatch, Position
from pipeline.testing import ManualClock

T0 = 1_704_067_200.0
STUCK_SECONDS = 30.0


class Topic:
    """A topic of which some partitions are owned."""

    def __init__(self):
        self.clock = ManualClock(T0)
        self.positions = {0: Position(0, 0)}
        self.offsets = {0: (0, 0)}
        self.stable = {}  # where the first open transaction begins, by partition
        self.is_away = False
        self.is_held = False
        self.lags = {}
        self.watch = LagWatch(
            positions=lambda: self.positions,
            offsets=self.ask,
            is_held=lambda: self.is_held,
            show=lambda lags: setattr(self, "lags", lags),
            clock=self.clock,
            stuck_seconds=STUCK_SECONDS,
        )

    async def ask(self, partitions):
        if self.is_away:
            raise ServiceUnavailable("away")
        return {
            partition: (earliest, self.stable.get(partition, end), end)
            for partition, (earliest, end) in self.offsets.items()
            if partition in partitions
        }

    async def pass_time(self, seconds, each=lambda: None):
        for _ in range(int(seconds / LOOK_SECONDS)):
            each()
            await self.watch.look()
            await self.clock.advance(LOOK_SECONDS)
        await self.watch.look()

    def age(self, partition=0):
        return self.clock.now() - self.lags[partition].since

    def read(self, next_offset, **known):
        self.positions[0] = Position(next_offset, next_offset, **known)


@pytest.fixture
def topic():
    return Topic()


async def test_lag_is_what_lies_before_the_end(topic):
    topic.offsets = {0: (0, 100)}
    topic.read(40)
    await topic.watch.look()
    assert topic.lags[0].records == 60


async def test_what_retention_deleted_is_no_lag(topic):
    topic.offsets = {0: (90, 100)}
    topic.read(40)
    await topic.watch.look()
    assert topic.lags[0].records == 10


async def test_partition_that_goes_takes_its_lag_with_it(topic):
    topic.positions = {0: Position(0, 0), 1: Position(0, 0)}
    topic.offsets = {0: (0, 1), 1: (0, 1)}
    await topic.watch.look()
    assert set(topic.lags) == {0, 1}
    del topic.positions[1]
    await topic.watch.look()
    assert set(topic.lags) == {0}
    topic.positions = {}
    await topic.watch.look()
    assert topic.lags == {}


async def test_age_counts_from_the_last_look_at_which_nothing_waited(topic):
    await topic.pass_time(10)
    topic.offsets = {0: (0, 1)}
    await topic.pass_time(20)
    assert topic.age() == 20


async def test_age_counts_from_the_last_record_that_was_read_while_a_backlog_is(topic):
    topic.offsets = {0: (0, 1000)}
    topic.read(500, not_before=T0 - 3600)
    await topic.watch.look()
    assert topic.age() == 3600


async def test_age_of_a_backlog_of_which_nothing_was_read_counts_from_the_first_look(topic):
    topic.offsets = {0: (0, 1000)}
    await topic.pass_time(10)
    assert topic.age() == 10


async def test_time_in_which_the_process_itself_was_stopped_does_not_count(topic):
    topic.offsets = {0: (0, 5)}
    await topic.pass_time(10)
    await topic.clock.advance(3600)
    await topic.watch.look()
    assert topic.watch.why_stuck() is None


async def test_consumer_that_does_not_move_is_stuck_after_its_time(topic):
    topic.offsets = {0: (0, 5)}
    await topic.pass_time(STUCK_SECONDS)
    assert topic.watch.why_stuck() is None
    await topic.pass_time(LOOK_SECONDS)
    assert "of partition 0, where 5 records wait, it has read none for 32 s" in topic.watch.why_stuck()
    topic.read(5)
    await topic.watch.look()
    assert topic.watch.why_stuck() is None


async def test_consumer_that_moves_however_slowly_is_not_stuck(topic):
    topic.offsets = {0: (0, 1000)}
    offsets = iter(range(1000))
    await topic.pass_time(10 * STUCK_SECONDS, each=lambda: topic.read(next(offsets)))
    assert topic.watch.why_stuck() is None


async def test_one_partition_that_does_not_move_is_enough(topic):
    topic.positions[1] = Position(0, 0)
    topic.offsets = {0: (0, 1000), 1: (0, 3)}
    offsets = iter(range(1000))
    await topic.pass_time(STUCK_SECONDS + LOOK_SECONDS, each=lambda: topic.read(next(offsets)))
    assert "partition 1" in topic.watch.why_stuck()


async def test_outage_of_kafka_is_not_stuck_and_its_time_does_not_count(topic):
    topic.offsets = {0: (0, 5)}
    await topic.pass_time(STUCK_SECONDS - LOOK_SECONDS)
    topic.is_away = True
    await topic.pass_time(10 * STUCK_SECONDS)
    assert topic.watch.why_stuck() is None
    assert topic.watch.why_unavailable() == "Kafka has not answered for 300 s"
    topic.is_away = False
    await topic.pass_time(STUCK_SECONDS)
    assert topic.watch.why_stuck() is None
    assert topic.watch.why_unavailable() is None
    assert topic.watch.seconds_unavailable() == 0
    await topic.pass_time(LOOK_SECONDS)
    assert topic.watch.why_stuck()


async def test_consumer_that_is_held_back_is_not_stuck(topic):
    topic.offsets = {0: (0, 5)}
    topic.is_held = True
    await topic.pass_time(10 * STUCK_SECONDS)
    assert topic.watch.why_stuck() is None
    topic.is_held = False
    await topic.pass_time(STUCK_SECONDS + LOOK_SECONDS)
    assert topic.watch.why_stuck()


async def test_consumer_with_nothing_to_read_is_not_stuck(topic):
    topic.offsets = {0: (7, 7)}
    await topic.pass_time(10 * STUCK_SECONDS)
    assert topic.watch.why_stuck() is None
    assert topic.lags[0].records == 0


async def test_records_that_wait_behind_the_consumer_are_lag_and_not_stuck(topic):
    topic.offsets = {0: (0, 5)}
    topic.positions = {0: Position(0, 5)}
    await topic.pass_time(10 * STUCK_SECONDS)
    assert topic.watch.why_stuck() is None
    assert topic.lags[0].records == 5


async def test_partition_that_comes_back_starts_over(topic):
    topic.offsets = {0: (0, 5)}
    await topic.pass_time(STUCK_SECONDS - LOOK_SECONDS)
    topic.positions = {}
    await topic.watch.look()
    topic.positions = {0: Position(0, 0)}
    await topic.pass_time(STUCK_SECONDS)
    assert topic.watch.why_stuck() is None


async def test_outage_of_kafka_is_noticed_without_partitions_too(topic):
    topic.positions = {}
    topic.is_away = True
    await topic.watch.look()
    assert topic.watch.why_unavailable()
    topic.is_away = False
    await topic.watch.look()
    assert topic.watch.why_unavailable() is None


async def test_kafka_answers_since_its_first_answer_after_an_outage(topic):
    assert topic.watch.seconds_answering() == 0
    await topic.pass_time(10)
    assert topic.watch.seconds_answering() == 10
    topic.is_away = True
    await topic.pass_time(10)
    assert topic.watch.seconds_answering() == 0
    topic.is_away = False
    await topic.pass_time(4)
    assert topic.watch.seconds_answering() == 4


async def test_records_in_and_behind_an_open_transaction_are_no_lag(topic):
    topic.offsets, topic.stable = {0: (0, 100)}, {0: 70}
    topic.read(40)
    await topic.watch.look()
    assert (topic.lags[0].records, topic.lags[0].uncommitted) == (30, 30)


async def test_transaction_that_stays_open_is_not_a_stuck_consumer(topic):
    topic.offsets, topic.stable = {0: (0, 100)}, {0: 70}
    topic.read(70)
    await topic.pass_time(10 * STUCK_SECONDS)
    assert topic.watch.why_stuck() is None
    assert topic.clock.now() - topic.lags[0].uncommitted_since == 10 * STUCK_SECONDS


async def test_age_of_a_transaction_counts_from_where_the_first_open_one_begins(topic):
    topic.offsets, topic.stable = {0: (0, 100)}, {0: 70}
    topic.read(70)
    await topic.pass_time(20)
    topic.stable[0] = 80  # the first has ended, the next is open
    topic.read(80)
    await topic.pass_time(10)
    assert topic.clock.now() - topic.lags[0].uncommitted_since == 10
    del topic.stable[0]
    topic.read(100)
    await topic.watch.look()
    assert (topic.lags[0].uncommitted, topic.lags[0].uncommitted_since) == (0, 0)


async def test_consumer_that_does_not_read_up_to_an_open_transaction_is_stuck(topic):
    topic.offsets, topic.stable = {0: (0, 100)}, {0: 70}
    topic.read(40)
    await topic.pass_time(STUCK_SECONDS + LOOK_SECONDS)
    assert "where 30 records wait" in topic.watch.why_stuck()
