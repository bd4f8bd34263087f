"""/metrics, /live and /ready of worker and sink."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import Producer

from pipeline.core.report import Entry, Report, encode_report
from pipeline.local import PackagedPostgres
from pipeline.local.process import free_port
from tests.support.deployment import Deployment, ask, eventually
from tests.support.prometheus_rules import breaches, families

pytestmark = pytest.mark.services


def samples(port):
    """Return the values of a live process by (name, labels), with names that lack the prefix."""
    return {
        (sample.name.removeprefix("agent_metadata_"), *sorted(sample.labels.values())): sample.value
        for family in families(ask(port, "/metrics")[1])
        for sample in family.samples
    }


async def start(pipeline, role):
    """Start a role that serves; return (process, port)."""
    port = pipeline.environment["AGENT_METADATA_METRICS_PORT"] = str(free_port())
    return await pipeline.started(role), int(port)


@pytest.mark.parametrize("role", ["worker", "sink"])
async def test_role_is_ready_once_it_owns_partitions_and_its_metrics_parse(deploy, role):
    pipeline = await deploy()
    _, port = await start(pipeline, role)
    await eventually("it is ready", lambda: ask(port, "/ready")[0] == 200)
    assert ask(port, "/live") == (200, "ok\n")
    status, text = ask(port, "/metrics")
    assert status == 200
    assert any(family.name.startswith("agent_metadata_") for family in families(text))
    assert breaches(text) == []
    assert ask(port, "/elsewhere")[0] == 404


async def test_metrics_tell_the_way_of_the_data(deploy):
    pipeline = await deploy(window_seconds=0.2)
    _, worker = await start(pipeline, "worker")
    _, sink = await start(pipeline, "sink")
    report(pipeline, "new", ago=100)
    await eventually("the row is there", lambda: value_is(pipeline, "new"))
    report(pipeline, "late", ago=200)
    report(pipeline, "from the future", ago=-3600, key="other")
    publisher = Producer(pipeline.settings.client_config())
    publisher.produce(pipeline.settings.events_topic, b"{")
    long_key = encode_report(Report(str(uuid.UUID(int=2)), [Entry("k" * 200)]))
    publisher.produce(pipeline.settings.events_topic, long_key)
    assert publisher.flush(10) == 0
    folded = {("records_total",): 5, ("entries_total",): 4, ("clamped_clocks_total",): 1}
    refused = {("dead_letters_total", "undecodable"): 1, ("dead_letters_total", "over_limit"): 1}
    await eventually("the worker tells", lambda: samples(worker).items() >= {**folded, **refused}.items())
    written = {
        ("rows_written_total",): 2,
        ("rows_inserted_total",): 2,
        ("stale_entries_total",): 1,
        ("flushed_total",): 3,
    }
    await eventually("the sink tells", lambda: samples(sink).items() >= written.items())
    for port, topic, hops in (
        (worker, pipeline.settings.events_topic, ("produced", "window_closed")),
        (sink, pipeline.settings.batches_topic, ("committed",)),
    ):
        no_lag = {("lag_records", *sorted((topic, str(number)))): 0 for number in range(4)}
        no_age = {("lag_age_seconds", *sorted((topic, str(number)))): 0 for number in range(4)}
        no_outage = {("outage_seconds", "kafka"): 0}
        await eventually("no lag", lambda p=port, e={**no_lag, **no_age, **no_outage}: samples(p).items() >= e.items())
        for hop in hops:
            ages = samples(port)
            # 100 s, 200 s and 0 s; two of them may have shared a chunk and been one sample.
            assert ages["freshness_seconds_count", hop] >= 1
            assert 0 <= ages["freshness_seconds_sum", hop] < 400


async def test_gauges_of_a_partition_go_with_it(deploy):
    pipeline = await deploy()
    _, port = await start(pipeline, "worker")

    def partitions(name):
        return len([key for key in samples(port) if key[0] == name])

    for name in ("lag_records", "lag_age_seconds", "open_pairs"):
        await eventually(f"{name} of all", lambda name=name: partitions(name) == 4)
    pipeline.environment["AGENT_METADATA_METRICS_PORT"] = "0"
    await pipeline.started("worker")
    for name in ("lag_records", "lag_age_seconds", "open_pairs"):
        await eventually(f"{name} of half", lambda name=name: partitions(name) == 2)


async def test_lag_of_the_sink_counts_what_is_not_applied_and_its_age_grows(bootstrap_servers, tmp_path):
    with PackagedPostgres() as postgres:
        pipeline = Deployment(bootstrap_servers, postgres.database_url, tmp_path, window_seconds=0.1)
        await pipeline.prepare()
        try:
            await pipeline.started("worker")
            _, port = await start(pipeline, "sink")
            await eventually("it is ready", lambda: ask(port, "/ready")[0] == 200)
            postgres.stop()
            away = "Postgres has not answered for "
            await eventually("an idle sink notices", lambda: ask(port, "/ready")[1].startswith(away))
            report(pipeline, "v")
            await eventually("it lags", lambda: max_of(port, "lag_records") == 1)
            await eventually("the lag gets older", lambda: max_of(port, "lag_age_seconds") > 5)
            assert samples(port)["outage_seconds", "postgres"] > 0
            assert ask(port, "/live")[0] == 200
            postgres.start()
            await eventually("the row is right", lambda: value_is(pipeline, "v"))
            await eventually("nothing lags", lambda: max_of(port, "lag_records") == 0)
            await eventually("it is ready", lambda: ask(port, "/ready")[0] == 200)
            assert samples(port)["outage_seconds", "postgres"] == 0
        finally:
            pipeline.close()


def max_of(port, name):
    return max((value for key, value in samples(port).items() if key[0] == name), default=None)


async def test_sink_holds_batches_back_and_is_not_ready_while_postgres_is_away(bootstrap_servers, tmp_path):
    port = free_port()
    with PackagedPostgres() as postgres:
        pipeline = Deployment(bootstrap_servers, postgres.database_url, tmp_path, window_seconds=0.1)
        await pipeline.prepare()
        try:
            await pipeline.started("worker")
            pipeline.environment["AGENT_METADATA_METRICS_PORT"] = str(port)
            await pipeline.started("sink")
            report(pipeline, "before")
            await eventually("the row is there", lambda: value_is(pipeline, "before"))
            postgres.stop()
            report(pipeline, "while it was away")
            held = (503, "Postgres can't take batches; they are held back\n")
            await eventually("the sink holds back", lambda: ask(port, "/ready") == held)
            assert ask(port, "/live")[0] == 200
            postgres.start()
            await eventually("the row is right", lambda: value_is(pipeline, "while it was away"))
            assert ask(port, "/ready")[0] == 200
        finally:
            pipeline.close()


def report(pipeline, value, ago=0.0, key="k"):
    with pipeline.producer() as producer:
        assert producer.add(uuid.UUID(int=1), [key], [value], [""], datetime.now(UTC) - timedelta(seconds=ago))


async def value_is(pipeline, value):
    return [row[0] for row in (await pipeline.table()).values()] == [value]
