import asyncio

import pytest

from pipeline.errors import ServiceUnavailable
from pipeline.kafka import topics
from pipeline.kafka.topics import Incarnation


class Kafka:
    """Counts requests, and answers each when the test says so."""

    def __init__(self):
        self.asked = 0
        self.answers = asyncio.Queue()

    async def topic_id(self):
        self.asked += 1
        answer = await self.answers.get()
        if isinstance(answer, Exception):
            raise answer
        return answer


async def turns():
    for _ in range(10):
        await asyncio.sleep(0)


async def test_who_calls_while_a_question_is_under_way_gets_the_answer_to_the_next():
    kafka = Kafka()
    topic = Incarnation("events", kafka.topic_id)
    early = asyncio.create_task(topic.topic_id())
    await turns()
    late = [asyncio.create_task(topic.topic_id()) for _ in range(3)]
    await turns()
    assert kafka.asked == 1
    kafka.answers.put_nowait("old")
    assert await early == "old"
    await turns()
    assert not any(task.done() for task in late)
    kafka.answers.put_nowait("new")
    assert await asyncio.gather(*late) == ["new"] * 3
    assert kafka.asked == 2


async def test_topic_that_is_not_there_has_no_id():
    kafka = Kafka()
    kafka.answers.put_nowait(None)
    assert await Incarnation("events", kafka.topic_id).topic_id() is None


async def test_absence_of_kafka_is_waited_out(monkeypatch):
    monkeypatch.setattr(topics, "_RETRY_SECONDS", 0)
    kafka = Kafka()
    for answer in (ServiceUnavailable("down"), ServiceUnavailable("down"), "id"):
        kafka.answers.put_nowait(answer)
    assert await Incarnation("events", kafka.topic_id).topic_id() == "id"


async def test_error_that_no_wait_mends_reaches_all_who_ask():
    kafka = Kafka()
    topic = Incarnation("events", kafka.topic_id)
    both = [asyncio.create_task(topic.topic_id()) for _ in range(2)]
    kafka.answers.put_nowait(ValueError("broken"))
    for task in both:
        with pytest.raises(ValueError, match="broken"):
            await task


async def test_one_who_asks_no_more_does_not_keep_the_answer_from_the_others():
    kafka = Kafka()
    topic = Incarnation("events", kafka.topic_id)
    one, other = (asyncio.create_task(topic.topic_id()) for _ in range(2))
    await turns()
    one.cancel()
    kafka.answers.put_nowait("id")
    assert await other == "id"
