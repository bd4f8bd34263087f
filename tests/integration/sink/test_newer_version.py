"""A batch of a version that the sink does not know waits for an upgrade, as batches wait for Postgres in an outage."""

import json
import time
import uuid
from datetime import UTC, datetime

import pytest

from pipeline.core.batch import Row
from pipeline.core.report import timestamp_us
from pipeline.kafka.topics import require_topics
from pipeline.local.process import free_port
from tests.support.batches import a_batch, produce_batches
from tests.support.deployment import ask, consume_all, eventually
from tests.support.next_version import MODULE, NEXT_VERSION

pytestmark = pytest.mark.services

STUCK_SECONDS = 15  # the least that the setting takes
T0 = datetime(2024, 1, 1, tzinfo=UTC)
AGENT = str(uuid.UUID(int=1))
ADVICE = "a batch of version 2, and this program reads version 1: upgrade the sinks first"


def batch(key, value, first, **changes):
    return a_batch(Row(AGENT, key, value, "", timestamp_us(T0)), first=first, **changes)


def newer(key, value, first, **changes):
    return batch(key, value, first, version=NEXT_VERSION, **changes)


def rows(**values):
    return {(AGENT, key): (value, "", T0) for key, value in values.items()}


async def test_partition_waits_at_a_newer_batch_and_newer_sinks_apply_all_in_order(deploy):
    port = free_port()
    pipeline = await deploy(partitions=2, metrics_port=port, stuck_seconds=STUCK_SECONDS)
    settings = pipeline.settings
    produce_batches(settings, batch("k", "1", 0), newer("k", "2", 1), newer("new", "2", 2), batch("k", "3", 3))
    produce_batches(settings, batch("other", "1", 0, topic_id="another"), partition=1)
    sink = await pipeline.started("sink")
    await pipeline.wait_for(rows(k="1", other="1"))
    (held,) = await eventually("it says so", lambda: pipeline.logged(sink, "partition_held_back"))
    assert (held["partition"], held["offset"], ADVICE in held["error"]) == (0, 1, True)
    await eventually("it is not ready", lambda: ask(port, "/ready")[0] == 503 and ADVICE in ask(port, "/ready")[1])
    assert "agent_metadata_held_partitions 1.0" in ask(port, "/metrics")[1]
    assert 'agent_metadata_outage_seconds{service="postgres"} 0.0' in ask(port, "/metrics")[1]

    held_since, first = time.monotonic(), 10
    while time.monotonic() < held_since + STUCK_SECONDS + 10:  # longer than what would count as stuck
        produce_batches(settings, batch("k", "4", first), newer("k", "5", first + 1))
        produce_batches(settings, batch("other", str(first), first, topic_id="another"), partition=1)
        await pipeline.wait_for(rows(k="1", other=str(first)))
        assert ask(port, "/live")[0] == 200
        first += 2

    code, out, err = await pipeline.run("status", "--json")
    assert (code, err, ADVICE in out, "holds 1 partitions back" in out) == (1, "", True, True)
    for command in (["replay", "--source", "batches", "--from", "1h ago"], ["refill"]):
        code, out, err = await pipeline.run(*command)
        assert (code, ADVICE in err.splitlines()[-1], "Traceback" in err) == (1, True, False)
    assert await pipeline.table() == rows(k="1", other=str(first - 2))

    pipeline.environment["AGENT_METADATA_METRICS_PORT"] = str(free_port())
    upgraded = pipeline.start("sink", module=MODULE)  # beside the old one, as in a rolling upgrade
    await eventually("it is in the group", lambda: pipeline.logged(upgraded, "partitions_assigned"))
    stopping = time.monotonic()
    assert pipeline.stop(sink) == 0
    assert time.monotonic() - stopping < 10
    await pipeline.wait_for(rows(k="5", new="2", other=str(first - 2)))
    assert consume_all(settings, settings.dead_letter_topic) == []
    assert "Traceback" not in pipeline.log(sink) + pipeline.log(upgraded)


async def test_why_does_not_skip_a_newer_batch_that_may_be_the_one(deploy):
    pipeline = await deploy(partitions=1)
    settings = pipeline.settings
    with pipeline.producer() as producer:
        assert producer.add(uuid.UUID(AGENT), ["k"], ["v"], [""], T0)
    topic_id = (await require_topics(settings.client_config(), pipeline.topics))["events"].topic_id
    produce_batches(settings, newer("k", "v", 0, topic_id=topic_id))
    code, out, err = await pipeline.run("why", AGENT, "k")
    assert (code, out, ADVICE in err, len(err.splitlines())) == (1, "", True, 1)
    produce_batches(settings, batch("k", "v", 0, topic_id=topic_id))  # behind it, and readable
    _, out, err = await pipeline.run("why", AGENT, "k", "--json")
    assert (json.loads(out)["verdict"], err) == ("not_applied", "")


async def test_batch_whose_reason_a_newer_worker_invented_is_applied(deploy):
    port = free_port()
    pipeline = await deploy(partitions=1, metrics_port=port)
    produce_batches(pipeline.settings, batch("k", "1", 0, reason="bored"))
    await pipeline.started("sink")
    await pipeline.wait_for(rows(k="1"))
    await eventually("it is counted", lambda: 'batches_total{reason="other"} 1.0' in ask(port, "/metrics")[1])
