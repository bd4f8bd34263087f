"""The command `agent-metadata why` on a real Kafka and a real Postgres."""

import json
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.kafka.publisher import Publisher
from tests.support.deployment import NONESUCH_MISSING, eventually

pytestmark = pytest.mark.services

A1, A2 = (uuid.UUID(int=number) for number in (1, 2))


async def why(pipeline, agent_id, key, *options):
    """Run the command to its end; return (exit code, stdout, stderr)."""
    return await pipeline.run("why", str(agent_id), key, *options)


async def verdict(pipeline, agent_id, key):
    code, out, err = await why(pipeline, agent_id, key, "--json")
    assert (code in (0, 1), err) == (True, "")
    return json.loads(out)


def report(pipeline, agent_id, at=None, **values):
    with pipeline.producer() as producer:
        at = at or datetime.now(UTC)
        producer.add(agent_id, list(values), list(values.values()), [""] * len(values), at)
    return at


async def is_verdict(pipeline, expected, agent_id, key):
    return (await verdict(pipeline, agent_id, key))["verdict"] == expected


async def test_pair_is_followed_from_report_to_row(deploy):
    pipeline = await deploy(window_seconds=0.2)
    assert (await verdict(pipeline, A1, "cpu"))["verdict"] == "no_event"
    report(pipeline, A1, cpu="old")
    at = report(pipeline, A1, cpu="new", mem="1 GB")
    report(pipeline, A2, cpu="another agent's")
    waiting = await verdict(pipeline, A1, "cpu")
    assert (waiting["verdict"], waiting["event"]["value"], waiting["event"]["offset"]) == ("not_closed", "new", 1)
    worker = await pipeline.started("worker")
    await eventually("the batch is there", lambda: is_verdict(pipeline, "not_applied", A1, "cpu"))
    pipeline.stop(worker)
    await pipeline.started("sink")
    await eventually("the row is there", lambda: is_verdict(pipeline, "held", A1, "cpu"))
    found = await verdict(pipeline, A1, "cpu")
    assert datetime.fromisoformat(found["event"]["collected_at"]) == at
    assert found["batch"]["partition"] == found["event"]["partition"]
    code, out, err = await why(pipeline, str(A1).upper(), "cpu")
    assert (code, err) == (0, "")
    assert "1@1" in out or "@1, appended" in out
    assert out.splitlines()[-1].startswith("held:")


async def test_row_that_is_newer_gone_or_undeclared_is_told_apart(deploy):
    pipeline = await deploy(window_seconds=0.2)
    await pipeline.started("worker")
    await pipeline.started("sink")
    report(pipeline, A1, cpu="v")
    await eventually("the row is there", lambda: is_verdict(pipeline, "held", A1, "cpu"))
    async with pipeline.connection() as connection:
        change = "update workspace_agent_metadata set collected_at = collected_at + $1::interval"
        await connection.execute(change, timedelta(hours=1))
        assert await is_verdict(pipeline, "row_newer", A1, "cpu")
        await connection.execute(change, timedelta(hours=-2))
        assert await is_verdict(pipeline, "row_older", A1, "cpu")
        await connection.execute("delete from workspace_agent_metadata")
    assert await is_verdict(pipeline, "row_gone", A1, "cpu")
    pipeline.environment["AGENT_METADATA_UNDECLARED"] = "ignore"
    assert await is_verdict(pipeline, "undeclared", A1, "cpu")


async def test_dead_letters_of_worker_and_sink_are_found_with_their_reasons(deploy):
    pipeline = await deploy(window_seconds=0.2)
    async with pipeline.connection() as connection:
        await connection.execute("alter table workspace_agent_metadata add check (value <> 'poison')")
    await pipeline.started("worker")
    await pipeline.started("sink")
    report(pipeline, A1, cpu="poison")
    publisher = Publisher(pipeline.settings.client_config())
    await (await publisher.send(pipeline.settings.events_topic, f'{{"agent_id": "{A2}", "entries": 1}}'.encode()))
    await publisher.close(5)
    await eventually("the row is dead-lettered", lambda: is_verdict(pipeline, "dead_letter", A1, "cpu"))
    assert "23514" in (await verdict(pipeline, A1, "cpu"))["dead_letter"]
    unreadable = await verdict(pipeline, A2, "cpu")
    assert unreadable["verdict"] == "unreadable"
    assert "not a report" in unreadable["explanation"]


async def test_wrong_agent_id_is_refused(deploy):
    code, out, err = await why(await deploy(), "", "cpu")
    assert (code, out) == (2, "")
    assert err == "agent-metadata: AGENT: agent_id has 0 characters; it must have 1 to 255: ''\n"


async def test_missing_topics_are_said_in_one_line(deploy):
    pipeline = await deploy()
    pipeline.environment["AGENT_METADATA_BATCHES_TOPIC"] = "nonesuch"
    code, out, err = await why(pipeline, A1, "cpu")
    assert (code, out) == (1, "")
    assert err == f"{NONESUCH_MISSING}\n"


async def test_report_far_from_the_end_of_its_topic_is_found(deploy):
    pipeline = await deploy(partitions=1)
    report(pipeline, A1, cpu="v")
    with pipeline.producer() as producer:
        for _ in range(25_000):
            assert producer.add(A2, ["cpu"], ["w"], [""], datetime.now(UTC))
    found = await verdict(pipeline, A1, "cpu")
    assert (found["event"]["offset"], found["event"]["value"]) == (0, "v")
