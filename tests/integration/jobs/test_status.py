"""The command `agent-metadata status` on a real Kafka and a real Postgres."""

import contextlib
import json
import socket
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import Producer

from tests.support.deployment import NONESUCH_MISSING, eventually

pytestmark = pytest.mark.services

AGENTS = [uuid.uuid5(uuid.NAMESPACE_OID, str(number)) for number in range(20)]


async def status(pipeline, *arguments):
    """Run the command to its end; return (exit code, stdout, stderr)."""
    return await pipeline.run("status", *arguments)


def produce(pipeline, at):
    with pipeline.producer() as producer:
        for agent_id in AGENTS:
            producer.add(agent_id, ["cpu", "mem"], ["1", "2"], ["", ""], at)
    return {(str(agent_id), key): (value, "", at) for agent_id in AGENTS for key, value in (("cpu", "1"), ("mem", "2"))}


def free_port():
    """A port with another free one above it."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("", 0))
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("", first.getsockname()[1] + 1))
                return first.getsockname()[1]


async def test_running_pipeline_is_healthy_and_shows_what_it_holds(deploy):
    pipeline = await deploy(metrics_port=free_port())
    running = pipeline.start("run")
    await eventually("both roles own partitions", lambda: len(pipeline.logged(running, "partitions_assigned")) == 2)
    await pipeline.wait_for(produce(pipeline, datetime.now(UTC) - timedelta(hours=2)))
    await eventually("all is committed", lambda: settled(pipeline))
    code, out, err = await status(pipeline, "--json")
    found = json.loads(out)
    assert (code, err, found["healthy"], found["problems"]) == (0, "", True, [])
    assert (found["workers"], found["sinks"], found["dead_letters"], found["outage_seconds"]) == (1, 1, 0, {})
    latest = found["table"].pop("latest_stale")
    assert found["table"] == {"rows": 40, "agents": 20, "stale_agents": 20}
    assert len(latest) == 5
    assert [item["partition"] for item in found["partitions"]] == [0, 1, 2, 3]
    assert {item["open_pairs"] for item in found["partitions"]} == {0}
    assert any(item["last_applied_at"] for item in found["partitions"])
    code, out, err = await status(pipeline, "--stale-after", "10000")
    assert (code, err) == (0, "")
    assert "40 rows of 20 agents; 0 stale" in out
    assert out.splitlines()[-1] == "healthy"
    assert out.count("note: Kafka has one broker") == 1
    assert max(map(len, out.splitlines())) <= 80


async def settled(pipeline):
    _, out, _ = await status(pipeline, "--json")
    partitions = json.loads(out)["partitions"]
    return all(item["worker_lag"] == item["sink_lag"] == (item["open_pairs"] or 0) == 0 for item in partitions)


async def test_pipeline_that_does_not_run_is_unhealthy_and_says_why(deploy):
    pipeline = await deploy(window_seconds=0.1)
    produce(pipeline, datetime.now(UTC))
    async with pipeline.connection() as connection:
        await connection.execute("truncate workspace_agent_metadata")
    code, out, err = await status(pipeline, "--json", "--max-lag", "0")
    assert err == ""
    found = json.loads(out)
    assert (code, found["healthy"]) == (1, False)
    assert [problem.partition(":")[0] for problem in found["problems"]][:2] == [
        "no worker is in its consumer group",
        "no sink is in its consumer group",
    ]
    assert found["problems"][-1].startswith("the table was emptied")
    assert sum(item["worker_lag"] for item in found["partitions"]) == 20
    assert max(item["worker_behind_seconds"] for item in found["partitions"]) > 0
    assert found["outage_seconds"] is None
    code, out, _ = await status(pipeline)
    assert code == 1
    assert "UNHEALTHY: no worker" in out


async def test_sink_that_is_away_is_seen_by_what_waits_for_it(deploy):
    pipeline = await deploy(window_seconds=0.1)
    await pipeline.started("worker")
    produce(pipeline, datetime.now(UTC))

    async def waits():
        return sum(item["sink_lag"] for item in json.loads((await status(pipeline, "--json"))[1])["partitions"])

    await eventually("batches wait", waits)
    code, out, _ = await status(pipeline, "--max-lag", "0")
    assert code == 1
    assert "UNHEALTHY: the sink is" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--metrics", "nonsense"], "is not a URL"), (["--metrics", "file:///etc/passwd"], "is not a URL")],
)
async def test_wrong_address_of_metrics_is_refused(deploy, arguments, said):
    code, out, err = await status(await deploy(), *arguments)
    assert (code, out) == (2, "")
    assert said in err


async def test_missing_topics_and_tables_are_said_in_one_line(deploy):
    pipeline = await deploy()
    pipeline.environment["AGENT_METADATA_EVENTS_TOPIC"] = "nonesuch"
    code, out, err = await status(pipeline)
    assert (code, out) == (1, "")
    assert err == f"{NONESUCH_MISSING}\n"
    async with pipeline.connection() as connection:
        await connection.execute("drop table agent_metadata_migrations")
    code, out, err = await status(pipeline)
    assert (code, out) == (1, "")
    assert "run `agent-metadata db migrate`" in err


@pytest.mark.parametrize("time_zone", ["America/New_York", "Europe/Berlin", "Asia/Kolkata"])
async def test_values_never_collected_are_shown_whatever_the_databases_time_zone(deploy, time_zone):
    """Coder's pairs begin in the year 1, which is BC in New York and has an offset with seconds in Berlin."""
    pipeline = await deploy()
    never, late = datetime(1, 1, 1, tzinfo=UTC), datetime(2024, 7, 1, 12, 0, 0, 250, tzinfo=UTC)
    async with pipeline.connection() as connection:
        database = await connection.fetchval("select quote_ident(current_database())")
        await connection.execute(f"alter database {database} set timezone to '{time_zone}'")
        await connection.executemany(
            "insert into workspace_agent_metadata (workspace_agent_id, display_name, key, script, timeout, interval, "
            "collected_at) values ($1, '', 'cpu', '', 0, 0, $2)",
            [(AGENTS[0], never), (AGENTS[1], late)],
        )
    _, out, err = await status(pipeline, "--json")
    assert err == ""
    latest = json.loads(out)["table"]["latest_stale"]
    assert [datetime.fromisoformat(agent["newest"]) for agent in latest] == [late, never]


async def test_schema_registry_that_is_away_is_named_as_what_is_waited_for(deploy):
    pipeline = await deploy(
        window_seconds=0.1, metrics_port=free_port(), schema_registry_url=f"http://127.0.0.1:{free_port()}"
    )
    await pipeline.started("worker")
    producer = Producer(pipeline.settings.client_config())
    producer.produce(pipeline.settings.events_topic, b"\0\0\0\0\1\2")
    assert producer.flush(30) == 0

    async def is_named():
        _, out, _ = await status(pipeline, "--json")
        return json.loads(out)["outage_seconds"].keys() == {"schema_registry"}

    await eventually("the registry is named", is_named, 30)
    code, out, _ = await status(pipeline)
    assert code == 1
    assert "for the schema registry, which is unavailable" in " ".join(out.split())
    assert "Postgres is unavailable" not in out
