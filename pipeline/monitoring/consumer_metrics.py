"""Metrics by partition: the lag of the topic that a worker or a sink consumes, and open transactions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from pipeline.monitoring.lag import Lag

PREFIX: Final = "agent_metadata_"


class PartitionGauges(Collector):
    """A gauge with a value for each partition that exists at the time of the scrape, and for no other."""

    def __init__(
        self,
        name: str,
        documentation: str,
        read: Callable[[], Mapping[int, float]],
        *,
        topic: str,
        registry: CollectorRegistry,
    ) -> None:
        self._name = PREFIX + name
        self._documentation = documentation
        self._read = read
        self._topic = topic
        registry.register(self)

    def describe(self) -> Iterator[GaugeMetricFamily]:
        """Name the gauge, so that the registry refuses another of its name."""
        yield GaugeMetricFamily(self._name, self._documentation, labels=["topic", "partition"])

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Read the values, in the scrape's thread."""
        for family in self.describe():
            for partition, value in sorted(self._read().items()):
                family.add_metric([self._topic, str(partition)], value)
            yield family


class ConsumerMetrics:
    """What worker and sink both report: the lag of the topic they consume, and how long services are unavailable."""

    def __init__(self, registry: CollectorRegistry, topic: str, now: Callable[[], float] = time.time) -> None:
        # Replaced as a whole: a scrape, which has a thread of its own, sees one look or the next.
        self.lags: Mapping[int, Lag] = {}

        def gauges(name: str, documentation: str, value: Callable[[Lag], float]) -> None:
            def read() -> dict[int, float]:
                return {partition: value(lag) for partition, lag in self.lags.items()}

            PartitionGauges(name, documentation, read, topic=topic, registry=registry)

        gauges(
            "lag_records",
            "Records that are in Kafka and not yet folded (worker) or not yet applied (sink).",
            lambda lag: lag.records,
        )
        gauges(
            "lag_age_seconds",
            "How long the oldest of these records has been in Kafka, to within seconds; 0 if there is none.",
            lambda lag: max(0.0, now() - lag.since) if lag.records else 0.0,
        )
        gauges(
            "uncommitted_records",
            "Records that wait in Kafka, in or behind an open transaction; they are not part of the lag.",
            lambda lag: lag.uncommitted,
        )
        gauges(
            "uncommitted_seconds",
            "How long the first open transaction has been seen; 0 if there is none.",
            lambda lag: max(0.0, now() - lag.uncommitted_since) if lag.uncommitted else 0.0,
        )
        self.outage_seconds = Gauge(
            f"{PREFIX}outage_seconds",
            "How long a service has been unavailable, or has refused what it was sent; 0 = not at all.",
            ["service"],
            registry=registry,
        )

    def show_lags(self, lags: Mapping[int, Lag]) -> None:
        """Show these lags from the next scrape on."""
        self.lags = lags
