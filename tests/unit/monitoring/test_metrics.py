"""Metrics: metadatabatcher's and ours, their names, and the names by which its API is found here."""

import pkgutil
import re
import time

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from pipeline.monitoring.lag import Lag
from pipeline.monitoring.metrics import (
    CODER_PREFIX,
    PREFIX,
    BridgeMetrics,
    ConsumerMetrics,
    Freshness,
    ListenerMetrics,
    Metrics,
    ProducerMetrics,
    ServeMetrics,
    SinkMetrics,
    WorkerMetrics,
)
from pipeline.settings import Settings
from tests.support.documentation import table_rows
from tests.support.prometheus_rules import breaches, families

# metadatabatcher's, as its Go source registers them: name, type, labels, buckets.
SEVEN = [
    ("batch_utilization", "histogram", (), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 15, 20, 40, 80, 160)),
    ("batch_size", "histogram", (), (10, 25, 50, 100, 150, 200, 250, 300, 350, 400, 450, 500)),
    ("flush_duration_seconds", "histogram", ("reason",), (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)),
    ("batches_total", "counter", ("reason",), None),
    ("dropped_keys_total", "counter", (), None),
    ("flushed_total", "counter", (), None),
    ("publish_errors_total", "counter", (), None),
]


@pytest.mark.parametrize("prefix", [PREFIX, CODER_PREFIX])
def test_metrics_are_metadatabatchers_seven_under_either_prefix(prefix):
    metrics = Metrics(prefix)
    for labelled in (metrics.flush_seconds, metrics.batches):
        labelled.labels("scheduled")
    registry = CollectorRegistry()
    for collector in metrics.collectors():
        registry.register(collector)
    found = []
    for family in registry.collect():
        own = [sample for sample in family.samples if not sample.name.endswith("_created")]
        labels = tuple(sorted({label for sample in own for label in sample.labels} - {"le"}))
        bounds = [float(sample.labels["le"]) for sample in own if sample.name.endswith("_bucket")]
        name = family.name + ("_total" if family.type == "counter" else "")
        found.append((name, family.type, labels, tuple(bounds[:-1]) if bounds else None))
    assert found == [(prefix + name, *rest) for name, *rest in SEVEN]


def test_a_sink_bears_coders_names_on_request_and_keeps_its_own():
    registry = CollectorRegistry()
    SinkMetrics(registry, Settings(metrics_prefix="coderd_agentapi_metadata_").metrics_prefix)
    names = {family.name for family in registry.collect()}
    assert {name for name in names if name.startswith("coderd_")} == {
        CODER_PREFIX + name.removesuffix("_total") for name, *_ in SEVEN
    }
    assert "agent_metadata_rows_written" in names


GO_NAMES = table_rows("docs/metadatabatcher.md", "Go names")
COUNTERPARTS = {name for row in GO_NAMES for name in re.findall(r"`([a-z_]+\.[A-Za-z_.]+)`", " ".join(row[1:]))}


@pytest.mark.parametrize("name", sorted(COUNTERPARTS))
def test_counterparts_of_go_names_are_there(name):
    assert pkgutil.resolve_name(f"pipeline.{name}") is not None


def test_counterparts_of_go_metrics_are_all_collectors_there_are():
    fields = [row[1][2:-1] for row in GO_NAMES if re.fullmatch(r"`Metrics\.\w+`", row[0]) and row[1].startswith("`.")]
    metrics = Metrics()
    assert {id(getattr(metrics, name)) for name in fields} == {id(collector) for collector in metrics.collectors()}


def make_all():
    """Make every role's metrics, each labelled metric with a value; return the registries by role."""
    registries = {role: CollectorRegistry() for role in ("worker", "sink", "listener", "producer", "serve", "bridge")}
    worker, sink = WorkerMetrics(registries["worker"], "events"), SinkMetrics(registries["sink"], topic="batches")
    listener, _ = ListenerMetrics(registries["listener"]), ProducerMetrics(registries["producer"])
    ServeMetrics(registries["serve"])
    BridgeMetrics(registries["bridge"]).outage_seconds.labels("kafka").set(0)
    for counter in (worker.windows, worker.dead_letters, sink.batches, sink.dead_letters):
        counter.labels("r").inc()
    sink.flush_seconds.labels("r").observe(1)
    worker.show_open_pairs({0: 1})
    for role in (worker, sink):
        role.consumer.show_lags({0: Lag(3, time.time() - 10), 1: Lag(0, 0.0)})
        role.consumer.outage_seconds.labels("kafka").set(0)
    for role in (worker, sink, listener):
        role.freshness.observe("committed", collected_at=5.0, at=12.0)
    return registries


def test_all_names_keep_to_prometheus_rules():
    for role, registry in make_all().items():
        assert breaches(generate_latest(registry).decode()) == [], role


def test_documentation_lists_every_metric_and_no_other():
    listed = {name for row in table_rows("docs/metrics.md", "All metrics") for name in re.findall(r"^`(\w+)", row[0])}
    shown = set()
    for registry in make_all().values():
        for family in families(generate_latest(registry).decode()):
            name = family.name.removeprefix(PREFIX)
            shown.add(name + "_total" if family.type == "counter" else name)
    assert listed == shown


def test_lag_and_its_age_are_shown_for_the_partitions_that_are_owned():
    registry = CollectorRegistry()
    metrics = ConsumerMetrics(registry, "events", now=lambda: 1010.0)
    metrics.show_lags({0: Lag(3, 1000.0), 1: Lag(0, 900.0)})

    def shown(name):
        return {
            (sample.labels["topic"], sample.labels["partition"]): sample.value
            for family in registry.collect()
            for sample in family.samples
            if family.name == name
        }

    assert shown("agent_metadata_lag_records") == {("events", "0"): 3, ("events", "1"): 0}
    assert shown("agent_metadata_lag_age_seconds") == {("events", "0"): 10, ("events", "1"): 0}
    metrics.show_lags({1: Lag(0, 900.0)})
    assert shown("agent_metadata_lag_records") == {("events", "1"): 0}


def test_freshness_of_an_agent_whose_clock_is_ahead_counts_as_none():
    registry = CollectorRegistry()
    freshness = Freshness(registry)
    freshness.observe("produced", collected_at=20.0, at=12.0)
    freshness.observe("produced", collected_at=5.0, at=12.0)
    assert registry.get_sample_value("agent_metadata_freshness_seconds_sum", {"hop": "produced"}) == 7
    assert registry.get_sample_value("agent_metadata_freshness_seconds_count", {"hop": "produced"}) == 2
