"""The command `agent-metadata replay` on a real Kafka and a real Postgres."""

import asyncio
import json
import uuid
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import asyncpg
import pytest
from confluent_kafka import Consumer, TopicPartition

from pipeline.core.notify import NOTIFY_CHANNEL, decode_agent_ids
from pipeline.kafka.topics import load_topic_specs
from pipeline.local import MockBroker
from tests.support.deployment import NONESUCH_MISSING, Deployment, eventually
from tests.support.topics import recreate_topics

pytestmark = pytest.mark.services

AGENTS = [uuid.uuid5(uuid.NAMESPACE_OID, str(number)) for number in range(40)]
HOUR = timedelta(hours=1)


def produce(pipeline, rounds, *, age=HOUR, agents=AGENTS):
    """Report two keys of each agent, `rounds` times; return what a table that had nothing must hold then."""
    expected, began = {}, datetime.now(UTC) - age
    with pipeline.producer() as producer:
        for number in range(rounds):
            at = began + timedelta(seconds=number)
            for agent_id in agents:
                assert producer.add(agent_id, ["cpu", "mem"], [f"{number}%", "1 GB"], ["", "slow"], at)
                expected[str(agent_id), "cpu"] = (f"{number}%", "", at)
                expected[str(agent_id), "mem"] = ("1 GB", "slow", at)
        assert producer.flush() == 0
    return expected


async def replay(pipeline, *arguments, code=0):
    """Run the command to its end; return (its JSON, its stderr)."""
    ended, out, err = await pipeline.run("replay", *arguments, "--json", seconds=120)
    assert ended == code, err
    return json.loads(out) if out else None, err


async def test_replay_fills_an_empty_table_and_a_second_one_changes_nothing(deploy):
    pipeline = await deploy()
    expected = produce(pipeline, 5)
    dry, _ = await replay(pipeline, "--from", "1h ago", "--dry-run")
    assert await pipeline.table() == {}
    done, _ = await replay(pipeline, "--from", "1h ago")
    assert await pipeline.table() == expected
    counts = ("records", "entries", "pairs", "changed", "already_newer", "dead", "refused", "undeclared")
    assert [done[name] for name in counts] == [200, 400, 80, 80, 0, 0, 0, 0]
    assert [dry[name] for name in counts] == [done[name] for name in counts]
    again, _ = await replay(pipeline, "--from", "1h ago")
    assert (again["changed"], again["already_newer"]) == (0, 80)
    assert await pipeline.table() == expected


async def test_replay_takes_the_range_of_arrival_only_and_never_moves_a_row_back(deploy):
    pipeline = await deploy()
    first = produce(pipeline, 1, age=2 * HOUR)
    await asyncio.sleep(0.01)  # the broker's times are milliseconds
    between = datetime.now(UTC).isoformat()
    await asyncio.sleep(0.01)
    second = produce(pipeline, 1)
    await replay(pipeline, "--from", between)
    assert await pipeline.table() == second
    done, _ = await replay(pipeline, "--from", "1h ago", "--to", between)
    assert (done["records"], done["changed"], done["already_newer"]) == (40, 0, 80)
    assert await pipeline.table() == second
    assert first != second


async def test_replay_of_batches_ends_in_the_same_table(deploy):
    pipeline = await deploy()
    await pipeline.started("worker")
    await pipeline.started("sink")
    expected = produce(pipeline, 5)
    await pipeline.wait_for(expected)
    async with pipeline.connection() as connection:
        await connection.execute("truncate workspace_agent_metadata")
    await replay(pipeline, "--from", "1h ago", "--source", "batches")
    assert await pipeline.table() == expected


async def test_replay_of_one_agent_and_key_leaves_the_others_alone(deploy):
    pipeline = await deploy()
    expected = produce(pipeline, 2)
    chosen = str(AGENTS[3])
    await replay(pipeline, "--from", "1h ago", "--agent", chosen.upper(), "--key", "cpu", "--key", "nonesuch")
    assert await pipeline.table() == {(chosen, "cpu"): expected[chosen, "cpu"]}


@pytest.mark.parametrize(("notify", "told_of"), [("final", AGENTS), ("off", [])])
async def test_replay_tells_listeners_as_it_is_asked_to(deploy, database_url, notify, told_of):
    pipeline = await deploy()
    expected = produce(pipeline, 2)
    told = set()
    listening = await asyncpg.connect(database_url)
    await listening.add_listener(NOTIFY_CHANNEL, lambda *notice: told.update(decode_agent_ids(notice[3])))
    await listening.add_listener("end_of_test", lambda *_: told.add("end"))
    await replay(pipeline, "--from", "1h ago", "--notify", notify)
    async with pipeline.connection() as connection:
        await connection.execute("notify end_of_test")  # arrives after what was sent before it
    await eventually("the end is told", lambda: "end" in told)
    await listening.close()
    assert told - {"end"} == set(told_of)
    assert await pipeline.table() == expected


async def test_undeclared_ignore_leaves_pairs_without_a_row_out_in_both_runs(deploy):
    pipeline = await deploy(undeclared="ignore")
    produce(pipeline, 2)
    async with pipeline.connection() as connection:
        await connection.execute(
            "insert into workspace_agent_metadata (workspace_agent_id, key) values ($1, 'cpu')", AGENTS[0]
        )
    dry, _ = await replay(pipeline, "--from", "1h ago", "--dry-run")
    done, _ = await replay(pipeline, "--from", "1h ago")
    for summary in (dry, done):
        assert (summary["changed"], summary["undeclared"], summary["already_newer"]) == (1, 79, 0)
    assert set(await pipeline.table()) == {(str(AGENTS[0]), "cpu")}


async def test_row_that_postgres_refuses_costs_itself_alone(deploy):
    pipeline = await deploy()
    expected = produce(pipeline, 1)
    async with pipeline.connection() as connection:
        await connection.execute(
            f"alter table workspace_agent_metadata add check (workspace_agent_id <> '{AGENTS[0]}' or key <> 'cpu')"
        )
    done, _ = await replay(pipeline, "--from", "1h ago")
    assert (done["changed"], done["refused"]) == (79, 1)
    del expected[str(AGENTS[0]), "cpu"]
    assert await pipeline.table() == expected


async def test_interrupted_replay_goes_on_from_its_file_and_ends_in_the_same_table(deploy, tmp_path):
    pipeline = await deploy()
    expected = produce(pipeline, 20)
    file = tmp_path / "replay.json"
    arguments = ("--from", "1h ago", "--resume", str(file), "--json")
    running = pipeline.start_command("replay", *arguments, "--rate", "200")

    def done():
        return json.loads(file.read_text())["done"] if file.exists() else []

    await eventually("a partition is done", lambda: done() or running.poll() is not None)
    running.send_signal(2)
    _, err = await asyncio.to_thread(running.communicate, timeout=30)
    assert running.returncode == 130, err
    assert f"continue with --resume {file}" in err
    assert "Traceback" not in err
    assert 1 <= len(done()) < 4
    finished, _ = await replay(pipeline, "--resume", str(file))
    assert await pipeline.table() == expected
    assert (finished["records"], finished["changed"], finished["already_newer"]) == (800, 80, 0)
    assert not file.exists()


async def test_killed_replay_goes_on_from_its_file_and_ends_in_the_same_table(deploy, tmp_path):
    pipeline = await deploy()
    expected = produce(pipeline, 20)
    file = tmp_path / "replay.json"
    running = pipeline.start_command("replay", "--from", "1h ago", "--resume", str(file), "--rate", "200")
    await eventually("a partition is done", lambda: file.exists() and json.loads(file.read_text())["done"])
    running.kill()
    await asyncio.to_thread(running.communicate)
    await replay(pipeline, "--resume", str(file))
    assert await pipeline.table() == expected


async def test_replay_beside_live_load_moves_no_row_back_nor_touches_group_or_progress(deploy):
    pipeline = await deploy(window_seconds=0.3)
    old = produce(pipeline, 50, age=2 * HOUR)
    async with pipeline.connection() as connection:
        await connection.execute(
            """
            create table went_back (agent_id uuid);
            create function note() returns trigger language plpgsql as $$
            begin
                if new.collected_at < old.collected_at then
                    insert into went_back values (new.workspace_agent_id);
                end if;
                return new;
            end $$;
            create trigger note after update on workspace_agent_metadata for each row execute function note();
            """
        )
    await pipeline.started("worker")
    await pipeline.started("sink")
    await pipeline.wait_for(old)
    await eventually("the worker has committed", lambda: min(committed(pipeline).values()) > 0)
    before = committed(pipeline), await progress(pipeline)
    await replay(pipeline, "--from", "3h ago")
    assert (committed(pipeline), await progress(pipeline)) == before
    replaying = [asyncio.create_task(replay(pipeline, "--from", "3h ago")) for _ in range(2)]
    expected = {}
    while not all(task.done() for task in replaying):
        expected.update(produce(pipeline, 1, age=timedelta(0)))
        await asyncio.sleep(0.02)  # the load
    await asyncio.gather(*replaying)
    await pipeline.wait_for(expected)
    async with pipeline.connection() as connection:
        assert await connection.fetchval("select count(*) from went_back") == 0


def committed(pipeline):
    settings = pipeline.settings
    consumer = Consumer({"bootstrap.servers": settings.kafka_bootstrap_servers, "group.id": settings.worker_group})
    try:
        wanted = [TopicPartition(settings.events_topic, number) for number in range(4)]
        return {item.partition: item.offset for item in consumer.committed(wanted, timeout=30)}
    finally:
        consumer.close()


async def progress(pipeline):
    async with pipeline.connection() as connection:
        rows = await connection.fetch("select topic_id, partition, next_offset from agent_metadata_progress")
        return {tuple(row) for row in rows}


async def test_empty_range_says_zero_and_exits_with_0(deploy):
    pipeline = await deploy()
    produce(pipeline, 1)
    done, _ = await replay(pipeline, "--from", "2024-01-01T00:00:00Z", "--to", "2024-01-02T00:00:00Z")
    assert (done["records"], done["changed"]) == (0, 0)


async def refused(pipeline, *arguments, code):
    """Return the one line that says what is wrong."""
    _, err = await replay(pipeline, *arguments, code=code)
    (line,) = err.splitlines()
    assert line.startswith("agent-metadata: ")
    return line


async def test_missing_topic_or_table_is_said_in_one_line(deploy):
    pipeline = await deploy()
    async with pipeline.connection() as connection:
        await connection.execute("drop table workspace_agent_metadata")
    assert "workspace_agent_metadata is gone" in await refused(pipeline, "--from", "1h ago", code=1)
    pipeline.environment["AGENT_METADATA_EVENTS_TOPIC"] = "nonesuch"
    line = await refused(pipeline, "--from", "1h ago", code=1)
    assert line == NONESUCH_MISSING


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [(["replay", "--from", "1h ago"], 2, "can't find records by time"), (["status"], 1, "embedded broker, for demos")],
)
async def test_embedded_broker_says_what_it_can_t_instead_of_finding_nothing(
    database_url, tmp_path, command, code, words
):
    with MockBroker() as broker:
        pipeline = Deployment(broker.bootstrap_servers, database_url, tmp_path)
        await pipeline.prepare()
        ended, _, err = await pipeline.run(*command)
    assert (ended, words in err) == (code, True), err


async def test_user_without_rights_is_told_before_anything_is_read(deploy, database_url):
    pipeline = await deploy()
    produce(pipeline, 1)
    role = f"reader_{pipeline.run_id}"
    async with pipeline.connection() as connection:
        await connection.execute(
            f"create role {role} login password 'reader'; grant select on all tables in schema public to {role}"
        )
        try:
            server = urlsplit(database_url)
            address = f"{role}:reader@{server.hostname}:{server.port}"
            pipeline.environment["DATABASE_URL"] = server._replace(netloc=address).geturl()
            line = await refused(pipeline, "--from", "1h ago", code=2)
            dry, _ = await replay(pipeline, "--from", "1h ago", "--dry-run")
        finally:
            await connection.execute(f"drop owned by {role}; drop role {role}")
    assert "permission denied for table workspace_agent_metadata" in line
    assert dry["changed"] == 80


async def test_file_of_another_replay_or_topic_is_refused(deploy, tmp_path):
    pipeline = await deploy()
    produce(pipeline, 20)
    file = tmp_path / "replay.json"
    running = pipeline.start_command("replay", "--from", "1h ago", "--resume", str(file), "--rate", "1")
    await eventually("it has begun", file.exists)
    running.send_signal(2)
    await asyncio.to_thread(running.communicate, timeout=30)
    resume = ("--resume", str(file))
    assert "belongs to another replay" in await refused(pipeline, *resume, "--source", "batches", code=2)
    assert "belongs to another replay" in await refused(pipeline, *resume, "--key", "cpu", code=2)
    specs = load_topic_specs(names=pipeline.settings.topic_names, partitions=4)
    await recreate_topics(pipeline.settings.client_config(), specs)
    assert "delete the file and start again" in await refused(pipeline, *resume, code=2)
    file.write_text("{}")
    assert "is not the file of a replay" in await refused(pipeline, *resume, code=2)
    assert "can't be written" in await refused(pipeline, "--from", "1h ago", "--resume", "/nonesuch/file", code=2)
