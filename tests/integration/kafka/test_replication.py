"""Topics on a cluster of three brokers, of which one is killed."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.core.replication import Replication
from pipeline.kafka.admin import KafkaAdmin
from pipeline.kafka.topics import create_topics, delete_topics
from tests.support.cluster import KafkaCluster, kafka_cluster
from tests.support.deployment import Deployment, eventually

pytestmark = pytest.mark.services

MIN_INSYNC = "min.insync.replicas"
AGENTS = [uuid.uuid5(uuid.NAMESPACE_OID, str(number)) for number in range(50)]


@pytest.fixture(scope="module")
def cluster(kafka_jars: list[Path]) -> Iterator[KafkaCluster]:
    with kafka_cluster(kafka_jars) as started:
        yield started


@pytest.fixture
async def pipeline(cluster, database_url, tmp_path):
    deployment = Deployment(cluster.bootstrap_servers, database_url, tmp_path)
    await deployment.prepare()
    await asyncio.to_thread(cluster.wait_known, set(deployment.settings.topic_names.values()))
    yield deployment
    deployment.close()


async def status(pipeline):
    _, out, err = await pipeline.run("status", "--json")
    assert err == ""
    return json.loads(out)


def produce(pipeline, value):
    now = datetime.now(UTC)
    with pipeline.producer() as producer:
        for agent_id in AGENTS:
            producer.add(agent_id, ["cpu"], [value], [""], now)
    return {(str(agent_id), "cpu"): (value, "", now) for agent_id in AGENTS}


async def test_topics_get_three_replicas_of_which_two_must_have_each_record(pipeline):
    names = set(pipeline.settings.topic_names.values())
    with KafkaAdmin(pipeline.settings.client_config()) as admin:
        found = admin.cluster(10)
        configs = admin.configs(names, 10)
    assert found.brokers == 3
    assert {found.replication[name] for name in names} == {3}
    assert {config[MIN_INSYNC] for config in configs.values()} == {"2"}
    assert await pipeline.run("topics", "diff") == (0, "the cluster's topics are as declared\n", "")
    assert (await status(pipeline))["risks"] == []


async def test_topic_of_one_replica_is_named_by_diff_and_status(pipeline):
    lone = pipeline.topics["dead_letter"]
    config = pipeline.settings.client_config()
    await asyncio.to_thread(delete_topics, config, {"dead_letter": lone})
    specs = {"dead_letter": replace(lone, replication=Replication(1))}
    await eventually("it is created again", lambda: create_topics(config, specs))
    code, out, err = await pipeline.run("topics", "diff")
    assert (code, err) == (1, "")
    assert out.splitlines() == [
        f"{lone.name}: replication is 1, declared 3 or more (auto)",
        f"{lone.name}: {MIN_INSYNC} is 1, declared 2 or more (auto)",
    ]
    said = f"{lone.name} is lost with one broker, as its replication factor is 1"
    assert [problem.partition(":")[0] for problem in (await status(pipeline))["problems"]][-1] == said
    pipeline.environment["AGENT_METADATA_TOPIC_REPLICATION"] = "1"
    found = await status(pipeline)
    assert [risk["text"].partition(":")[0] for risk in found["risks"] if not risk["is_problem"]] == [said]


async def test_pipeline_goes_on_after_one_broker_was_killed(cluster, pipeline):
    await pipeline.started("worker")
    await pipeline.started("sink")
    await pipeline.wait_for(produce(pipeline, "before"))
    victim = cluster.leaders(pipeline.settings.events_topic)[0]
    cluster.nodes[victim].kill()
    try:
        await pipeline.wait_for(produce(pipeline, "while one is down"))
        await asyncio.to_thread(cluster.wait_alive, set(cluster.nodes) - {victim})
        assert victim not in cluster.leaders(pipeline.settings.events_topic)
        assert await pipeline.run("topics", "diff") == (0, "the cluster's topics are as declared\n", "")
    finally:
        await asyncio.to_thread(cluster.nodes[victim].start)
    await pipeline.wait_for(produce(pipeline, "after"))
