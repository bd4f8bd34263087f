"""Where to start in the batches topic, and the check before each write that it is still the topic that was read."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final

import structlog

from pipeline.errors import ServiceUnavailable, TopicMismatch
from pipeline.kafka.topics import Incarnation, TopicFacts, require_topics
from pipeline.postgres.progress import PartitionId, Received
from pipeline.postgres.store import Applied, Reject, Store
from pipeline.settings import Settings

_RETRY_SECONDS: Final = 1.0

_log = structlog.get_logger(__name__)


class BatchesTopic:
    """Applies batches of one incarnation of the topic: offsets, and so progress, mean nothing beyond it."""

    def __init__(self, settings: Settings, topic: TopicFacts, store: Store, incarnation: Incarnation) -> None:
        """Start with `topic` as Kafka describes it now; `incarnation` is the same topic's."""
        self._settings = settings
        self._name = topic.name
        self._topic_id = topic.topic_id
        self._store = store
        self._incarnation = incarnation

    async def locate(self, partitions: Sequence[int]) -> Mapping[int, int]:
        """Return the next offset to apply of each partition that has any progress; waits out any outage.

        Raises:
            TopicMismatch: the topics are missing, or don't fit together.
        """
        while True:
            try:
                # Asked each time: the topic may have been deleted and recreated since.
                topics = await require_topics(self._settings.client_config(), self._settings.declared_topics())
                self._topic_id = topics["batches"].topic_id
                return await self._store.next_offsets(self._topic_id, partitions)
            except ServiceUnavailable as error:
                _log.warning("waiting_to_start_reading", error=str(error))
                await asyncio.sleep(_RETRY_SECONDS)

    async def apply(self, partition: int, received: Sequence[Received], reject: Reject, *, earliest: int) -> Applied:
        """Apply records as Store.apply does, if they are of the topic whose progress Postgres keeps.

        Raises:
            TopicMismatch: the topic was recreated, and the records may be of both topics.
            ProgressGap, ServiceUnavailable, ConfigError: as Store.apply.
        """
        if await self._incarnation.topic_id() not in (self._topic_id, None):
            raise TopicMismatch(f"{self._name} was recreated while this sink read it: start it again")
        target = PartitionId(self._topic_id, partition, self._name)
        return await self._store.apply(target, received, reject, earliest=earliest)
