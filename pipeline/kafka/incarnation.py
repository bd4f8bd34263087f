"""Which incarnation of a topic is there now, by Kafka's id of it: a topic made anew has another one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from pipeline.errors import ServiceUnavailable

# How soon a question is asked again that Kafka has not answered.
_RETRY_SECONDS: Final = 1.0

_log = structlog.get_logger(__name__)


class Incarnation:
    """Asks for a topic's id by `ask`, which raises ServiceUnavailable if Kafka does not answer."""

    def __init__(self, topic: str, ask: Callable[[], Awaitable[str | None]]) -> None:
        self._topic = topic
        self._ask = ask
        self._asking: asyncio.Task[str | None] | None = None
        self._next: asyncio.Task[str | None] | None = None

    async def topic_id(self) -> str | None:
        """Return the topic's id now, waiting while Kafka is away; None: there is no such topic.

        Guarantee: Kafka is asked after this call. So what was read before it is of the incarnation in the answer, or of
        an earlier one. All who call meanwhile share the next question.
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
