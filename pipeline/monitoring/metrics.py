"""Prometheus metrics, on a registry that the caller provides."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.registry import Collector

from pipeline.monitoring.consumer_metrics import PREFIX, ConsumerMetrics, PartitionGauges

# With this prefix metadatabatcher's seven metrics have coder's own names.
CODER_PREFIX: Final = "coderd_agentapi_metadata_"
# Source of the buckets: coder's metadatabatcher, so that its dashboards fit; names differ in the prefix only.
UTILIZATION_BUCKETS: Final = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 40, 80, 160)
BATCH_SIZE_BUCKETS: Final = (10, 25, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500)
FLUSH_SECONDS_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
# From a window of a tenth of a second to an outage of an hour.
FRESHNESS_SECONDS_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 7.5, 10, 15, 30, 60, 300, 900, 3600)

# The hops of an entry, in order; each is observed where its time is known.
Hop = Literal["produced", "window_closed", "committed", "notified", "sent"]


class Freshness:
    """How old entries are at each hop; registered once per process, whatever hops it sees."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._histogram = Histogram(
            f"{PREFIX}freshness_seconds",
            "Seconds since an entry was collected, when it reached a hop: produced (Kafka's timestamp of the record), "
            "window_closed, committed (the row is written), notified (a listener was notified), sent (to a client of "
            "`serve`). Sampled: one report per chunk, one entry per batch, one row per notification or event.",
            ["hop"],
            buckets=FRESHNESS_SECONDS_BUCKETS,
            registry=registry,
        )

    def observe(self, hop: Hop, *, collected_at: float, at: float) -> None:
        """Record one entry; both times in seconds since the Unix epoch. If the agent's clock is ahead, its age is 0."""
        self._histogram.labels(hop).observe(max(0.0, at - collected_at))


class Metrics:
    """metadatabatcher's seven metrics, with its buckets and labels; registered nowhere yet.

    `prefix` is PREFIX, or CODER_PREFIX for coder's own names. A sink fills all but `dropped_keys`, which is the
    producer's: what has reached Kafka is not dropped.
    """

    def __init__(self, prefix: str = PREFIX) -> None:
        self.batch_utilization = Histogram(
            f"{prefix}batch_utilization",
            "Keys per agent and batch, observed after the commit.",
            buckets=UTILIZATION_BUCKETS,
            registry=None,
        )
        self.batch_size = Histogram(
            f"{prefix}batch_size", "Entries per applied batch.", buckets=BATCH_SIZE_BUCKETS, registry=None
        )
        self.flush_seconds = Histogram(
            f"{prefix}flush_duration_seconds",
            "Duration of the transaction that applied a batch, NOTIFY and retries included.",
            ["reason"],
            buckets=FLUSH_SECONDS_BUCKETS,
            registry=None,
        )
        self.batches = Counter(f"{prefix}batches", "Batches applied.", ["reason"], registry=None)
        self.dropped_keys = Counter(
            f"{prefix}dropped_keys",
            "Entries of reports that a producer dropped because its local queue was full.",
            registry=None,
        )
        self.flushed = Counter(f"{prefix}flushed", "Entries of applied batches.", registry=None)
        self.publish_errors = Counter(
            f"{prefix}publish_errors",
            "NOTIFY payloads of transactions that failed; they were sent again when the transaction was retried.",
            registry=None,
        )

    def collectors(self) -> list[Collector]:
        """Return the seven metrics, to be registered."""
        return [
            self.batch_utilization,
            self.batch_size,
            self.flush_seconds,
            self.batches,
            self.dropped_keys,
            self.flushed,
            self.publish_errors,
        ]


class ProducerMetrics:
    """What a MetadataProducer counts."""

    def __init__(self, registry: CollectorRegistry, prefix: str = PREFIX) -> None:
        self.dropped_keys = Metrics(prefix).dropped_keys
        registry.register(self.dropped_keys)
        self.failed_deliveries = Counter(
            "agent_metadata_failed_deliveries", "Reports that Kafka did not acknowledge.", registry=registry
        )


class WorkerMetrics:
    """What a worker counts."""

    def __init__(self, registry: CollectorRegistry, topic: str = "") -> None:
        self.consumer = ConsumerMetrics(registry, topic)
        self.freshness = Freshness(registry)
        self.records = Counter("agent_metadata_records", "Records of the events topic consumed.", registry=registry)
        self.entries = Counter("agent_metadata_entries", "Entries folded.", registry=registry)
        self.windows = Counter("agent_metadata_windows", "Windows closed.", ["reason"], registry=registry)
        self.rows = Counter("agent_metadata_window_rows", "Rows of closed windows, after dedup.", registry=registry)
        self.dead_letters = Counter(
            "agent_metadata_dead_letters", "Records dead-lettered.", ["reason"], registry=registry
        )
        self.clamped_clocks = Counter(
            "agent_metadata_clamped_clocks",
            "Times set back because they were too far ahead of the broker's clock.",
            registry=registry,
        )
        self.lost_records = Counter(
            "agent_metadata_retention_lost_records",
            "Records that retention deleted before they were consumed.",
            registry=registry,
        )
        self.unacknowledged_seconds = Gauge(
            "agent_metadata_unacknowledged_seconds",
            "How long the oldest closed window has waited for Kafka to acknowledge it; 0 = none is waiting.",
            registry=registry,
        )
        self._open_pairs: Mapping[int, int] = {}
        PartitionGauges(
            "open_pairs", "Unique pairs in open windows.", lambda: self._open_pairs, topic=topic, registry=registry
        )

    def show_open_pairs(self, pairs: Mapping[int, int]) -> None:
        """Show these numbers from the next scrape on, for the partitions this worker owns now and for no others."""
        self._open_pairs = pairs


class SinkMetrics(Metrics):
    """What a sink counts: metadatabatcher's seven, and its own."""

    def __init__(self, registry: CollectorRegistry, prefix: str = PREFIX, topic: str = "") -> None:
        super().__init__(prefix)
        for collector in self.collectors():
            registry.register(collector)
        self.consumer = ConsumerMetrics(registry, topic)
        self.freshness = Freshness(registry)
        self.skipped_batches = Counter(
            "agent_metadata_skipped_batches", "Batches whose source range had been applied before.", registry=registry
        )
        self.rows_written = Counter("agent_metadata_rows_written", "Rows that changed.", registry=registry)
        self.rows_inserted = Counter(
            "agent_metadata_rows_inserted", "Of these, rows of pairs that had none before.", registry=registry
        )
        self.notify_payloads = Counter("agent_metadata_notify_payloads", "NOTIFY payloads sent.", registry=registry)
        self.rows_unchanged = Counter(
            "agent_metadata_rows_unchanged",
            "Rows of batches that Postgres already had; with UNDECLARED=ignore the undeclared and the stale ones too.",
            registry=registry,
        )
        self.stale_entries = Counter(
            "agent_metadata_stale_entries",
            "Rows of batches refused because the row in Postgres is newer; not counted with UNDECLARED=ignore.",
            registry=registry,
        )
        self.failed_flushes = Counter(
            "agent_metadata_failed_flushes", "Transactions that failed and were retried.", registry=registry
        )
        self.dead_letters = Counter(
            "agent_metadata_dead_letters", "Records or rows dead-lettered.", ["reason"], registry=registry
        )
        self.held_partitions = Gauge(
            "agent_metadata_held_partitions",
            "Partitions held back at a batch of a newer version than this sink reads: upgrade the sinks first.",
            registry=registry,
        )
        self.lost_batches = Counter(
            "agent_metadata_retention_lost_batches",
            "Batches that retention deleted before they were applied.",
            registry=registry,
        )


class ServeMetrics:
    """What a process that serves counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.watchers = Gauge("agent_metadata_watchers", "Open event streams.", registry=registry)
        self.dropped_watchers = Counter(
            "agent_metadata_dropped_watchers",
            "Event streams cut off because their client had stopped reading.",
            registry=registry,
        )
        self._pairs = Gauge("agent_metadata_served_pairs", "Pairs that are served.", registry=registry)
        self._stale_pairs = Gauge(
            "agent_metadata_stale_pairs", "Served pairs older than three of their usual intervals.", registry=registry
        )
        self._left_out_pairs = Gauge(
            "agent_metadata_left_out_pairs", "Pairs beyond AGENT_METADATA_SERVE_MAX_PAIRS, to 2 %.", registry=registry
        )

        self.report_requests = Counter(
            "agent_metadata_report_requests", "Requests to POST /reports.", ["status"], registry=registry
        )
        self.posted_reports = Counter(
            "agent_metadata_posted_reports",
            "Reports of these: accepted, as Kafka acknowledged them, or refused, as they can't be used.",
            ["outcome"],
            registry=registry,
        )
        self.waiting_reports = Gauge(
            "agent_metadata_waiting_reports", "Reports of these that Kafka has yet to acknowledge.", registry=registry
        )

    def show_pairs(self, pairs: int, stale: int, left_out: int) -> None:
        """Set the gauges."""
        self._pairs.set(pairs)
        self._stale_pairs.set(stale)
        self._left_out_pairs.set(left_out)


class ListenerMetrics:
    """What a listener counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.freshness = Freshness(registry)
        self.payloads = Counter("agent_metadata_listener_payloads", "NOTIFY payloads received.", registry=registry)
        self.ignored_payloads = Counter(
            "agent_metadata_listener_ignored_payloads",
            "NOTIFY payloads that are not agent ids; another program uses the channel.",
            registry=registry,
        )
        self.cuts = Counter(
            "agent_metadata_listener_cuts",
            "Connections lost; what was missed is read after reconnecting.",
            registry=registry,
        )


class BridgeMetrics:
    """What a bridge counts."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.rows = Counter("agent_metadata_bridge_rows", "Changed rows of coder's table sent.", registry=registry)
        self.reports = Counter(
            "agent_metadata_bridge_reports", "Reports made of them, acknowledged by Kafka.", registry=registry
        )
        self.cuts = Counter(
            "agent_metadata_bridge_cuts",
            "Connections to coder's database lost; after each, the whole table is sent again.",
            registry=registry,
        )
        self.outage_seconds = Gauge(
            "agent_metadata_outage_seconds", "How long a service has been unavailable.", ["service"], registry=registry
        )
        self._look_seconds = Gauge(
            "agent_metadata_bridge_look_seconds",
            "How long the last look through coder's table took, until Kafka had acknowledged what it found.",
            registry=registry,
        )
        self._began_at = time.monotonic()
        Gauge(
            "agent_metadata_bridge_lag_seconds",
            "Age of the last state of coder's table that is in Kafka as a whole.",
            registry=registry,
        ).set_function(lambda: time.monotonic() - self._began_at)

    def show_look(self, began_at: float, seconds: float) -> None:
        """Show a look that is complete; it began at this time of the monotonic clock."""
        self._began_at = began_at
        self._look_seconds.set(seconds)
