"""Which incarnation of a topic exists now, by Kafka's topic id: a recreated topic has another one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, Self

import structlog

from pipeline.errors import ServiceUnavailable
from pipeline.kafka.admin import KafkaAdmin
from pipeline.kafka.topics import TopicFacts

_ANSWER_SECONDS: Final = 8.0
# Pause before a request that Kafka did not answer is repeated.
_RETRY_SECONDS: Final = 1.0

_log = structlog.get_logger(__name__)


class Incarnation:
    """Asks for a topic's id by `ask`, which raises ServiceUnavailable if Kafka does not answer."""

    def __init__(self, topic: str, ask: Callable[[], Awaitable[str | None]]) -> None:
        self._topic = topic
        self._ask = ask
        self._asking: asyncio.Task[str | None] | None = None
        self._next: asyncio.Task[str | None] | None = None

    @classmethod
    def of(cls, topic: TopicFacts, admin: KafkaAdmin) -> Self:
        """Make one that asks `admin`, or remembers the id of an embedded broker's topic, as it deletes none."""

        async def ask() -> str | None:
            return topic.topic_id if topic.is_embedded else await admin.topic_id(topic.name, _ANSWER_SECONDS)

        return cls(topic.name, ask)

    async def topic_id(self) -> str | None:
        """Return the topic's id now, waiting while Kafka is unavailable; None: there is no such topic.

        Guarantee: Kafka is asked after this call began. So what was read before it is of the incarnation in the answer,
        or of an earlier one. Concurrent calls share the next request.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._ask_after(self._asking))
        return await asyncio.shield(self._next)

    async def _ask_after(self, asking: asyncio.Task[str | None] | None) -> str | None:
        if asking is not None:
            await asyncio.wait([asking])
        self._asking, self._next = self._next, None
        while True:
            try:
                return await self._ask()
            except ServiceUnavailable as error:
                _log.warning("waiting_for_topic_id", topic=self._topic, error=str(error))
                await asyncio.sleep(_RETRY_SECONDS)
