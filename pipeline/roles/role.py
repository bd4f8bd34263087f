"""What worker and sink share: how long they wait for services, and how they watch Kafka."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from pipeline.clock import SystemClock
from pipeline.errors import ANSWER_SECONDS
from pipeline.kafka.admin import KafkaAdmin, Offsets
from pipeline.kafka.topics import TopicFacts, require_topics
from pipeline.monitoring.consumer_metrics import ConsumerMetrics
from pipeline.monitoring.lag import LagWatch, Position
from pipeline.settings import Settings

# How long startup waits for Kafka before it says that it can't be reached.
START_TIMEOUT_SECONDS: Final = 8.0
# Everything that matters was awaited before; this is for dead letters in flight.
LAST_FLUSH_SECONDS: Final = 1.0


async def find_topics(settings: Settings) -> dict[str, TopicFacts]:
    """Return what the declared topics are, by role, for a process that starts.

    Raises:
        TopicMismatch: one is missing, or they don't fit together.
        ServiceUnavailable: Kafka did not answer within 8 s.
    """
    return await require_topics(settings.client_config(), settings.declared_topics(), timeout_s=START_TIMEOUT_SECONDS)


def watch_lag(
    settings: Settings,
    admin: KafkaAdmin,  # not the consumer: what is stuck in it must not keep the offsets from being asked for
    topic: TopicFacts,
    positions: Callable[[], Mapping[int, Position]],
    is_held: Callable[[], bool],
    metrics: ConsumerMetrics,
) -> LagWatch:
    """Make a watch of a topic that a consumer reads; see LagWatch for the callables."""

    async def offsets(partitions: Sequence[int]) -> Mapping[int, Offsets]:
        # A second less than the watch waits, so that the admin client gives up first, and replaces its connection.
        return await admin.offsets(topic.name, partitions, ANSWER_SECONDS - 1)

    watch = LagWatch(
        positions=positions,
        offsets=offsets,
        is_held=is_held,
        show=metrics.show_lags,
        clock=SystemClock(),
        stuck_seconds=settings.stuck_seconds,
    )
    metrics.outage_seconds.labels("kafka").set_function(watch.seconds_unavailable)
    return watch
