"""The whole data path, as processes, on a real Kafka and a real Postgres."""

import asyncio
import uuid
from datetime import UTC, datetime, timedelta

import asyncpg
import pytest
from confluent_kafka import Producer

from pipeline.core.batch import decode_batch
from pipeline.core.notify import NOTIFY_CHANNEL, decode_agent_ids
from pipeline.kafka.publisher import Publisher
from pipeline.kafka.topics import create_topics, load_topic_specs
from tests.support.deployment import consume_all, eventually, flatten

pytestmark = pytest.mark.services

AGENTS = [uuid.uuid5(uuid.NAMESPACE_OID, str(number)) for number in range(40)]


def report_all(producer, round_number, expected, *, agents=AGENTS):
    """Report two keys of each agent; note what the table must hold."""
    now = datetime.now(UTC)
    for agent_id in agents:
        assert producer.add(agent_id, ["cpu", "mem"], [f"{round_number}%", "1 GB"], ["", "slow"], now)
        expected[str(agent_id), "cpu"] = (f"{round_number}%", "", now)
        expected[str(agent_id), "mem"] = ("1 GB", "slow", now)


async def test_reports_become_rows_and_listeners_are_told(deploy, database_url):
    deployment = await deploy()
    await deployment.started("worker")
    await deployment.started("sink")
    told = set()
    listening = await asyncpg.connect(database_url)
    await listening.add_listener(NOTIFY_CHANNEL, lambda *notice: told.update(decode_agent_ids(notice[3])))
    expected = {}
    with deployment.producer() as producer:
        for number in range(20):
            report_all(producer, number, expected)
    await deployment.wait_for(expected)
    await eventually("all agents are notified of", lambda: told == set(AGENTS))
    await listening.close()


async def test_batches_hold_the_latest_of_each_pair_once(deploy):
    deployment = await deploy(window_seconds=60, batch_size=7)
    worker = await deployment.started("worker")
    expected = {}
    with deployment.producer() as producer:
        for number in range(5):
            report_all(producer, number, expected)
    await eventually("records are folded", lambda: all_are_folded(deployment, 5 * len(AGENTS)))
    assert deployment.stop(worker) == 0
    batches = [
        decode_batch(message.value()) for message in consume_all(deployment.settings, deployment.settings.batches_topic)
    ]
    rows = flatten(batches)
    assert {row[:2]: (row.value, row.error, row.collected_at) for row in rows} == expected
    assert len(rows) == len(expected)
    assert {batch.reason for batch in batches} == {"shutdown"}
    assert max(len(batch.agent_ids) for batch in batches) == 7


def all_are_folded(deployment, records):
    """Tell whether the topic holds them all; how far the worker has read before it commits is not visible."""
    return len(consume_all(deployment.settings, deployment.settings.events_topic)) == records


async def dead_letters(deployment, count):
    """Wait for `count` of them; they may come after the rows that were read with them."""

    def read():
        letters = consume_all(deployment.settings, deployment.settings.dead_letter_topic)
        return letters if len(letters) >= count else None

    return await eventually(f"{count} dead letters", read)


async def test_bad_record_is_dead_lettered_with_its_reason_and_the_rest_goes_on(deploy):
    deployment = await deploy()
    await deployment.started("worker")
    await deployment.started("sink")
    publisher = Publisher(deployment.settings.client_config())
    expected = {}
    bad = [b"{", b'{"agent_id":"","entries":[{"key":"k"}]}', None]
    for value in bad:
        await (await publisher.send(deployment.settings.events_topic, value, key=b"bad", headers=[("from", b"test")]))
    with deployment.producer() as producer:
        report_all(producer, 1, expected)
    await publisher.close(5)
    await deployment.wait_for(expected)
    letters = await dead_letters(deployment, len(bad))
    assert sorted(letter.value() or b"" for letter in letters) == sorted(value or b"" for value in bad)
    headers = [dict(letter.headers()) for letter in letters]
    assert {header["from"] for header in headers} == {b"test"}
    assert {header["__connect.errors.topic"].decode() for header in headers} == {deployment.settings.events_topic}
    reasons = b" ".join(sorted(header["__connect.errors.exception.message"] for header in headers)).decode()
    assert "agent_id has 0 characters" in reasons
    assert "tombstone" in reasons


async def test_postgres_refusing_a_row_dead_letters_that_row_alone(deploy):
    deployment = await deploy()
    async with deployment.connection() as connection:
        await connection.execute("alter table workspace_agent_metadata add check (value <> 'poison')")
    await deployment.started("worker")
    await deployment.started("sink")
    expected = {}
    with deployment.producer() as producer:
        producer.add(AGENTS[0], ["bad"], ["poison"], [""], datetime.now(UTC))
        report_all(producer, 1, expected)
    await deployment.wait_for(expected)
    (letter,) = await dead_letters(deployment, 1)
    headers = dict(letter.headers())
    assert headers["__connect.errors.sqlstate"] == b"23514"
    assert b"poison" in letter.value()


async def test_clock_an_hour_ahead_does_not_freeze_its_row(deploy):
    deployment = await deploy()
    await deployment.started("worker")
    await deployment.started("sink")
    agent_id, pair = AGENTS[0], (str(AGENTS[0]), "k")
    with deployment.producer() as producer:
        producer.add(agent_id, ["k"], ["from the future"], [""], datetime.now(UTC) + timedelta(hours=1))
    await eventually("the row is there", deployment.table)
    with deployment.producer() as producer:
        producer.add(agent_id, ["k"], ["now"], [""], datetime.now(UTC))

    async def value():
        return (await deployment.table())[pair][0] == "now"

    await eventually("the true time wins", value)


async def test_second_worker_joins_and_leaves_and_nothing_is_lost(deploy):
    deployment = await deploy()
    await deployment.started("sink")
    await deployment.started("worker")
    expected = {}
    with deployment.producer() as producer:
        for number in range(30):
            report_all(producer, number, expected)
            producer.flush()
            if number == 10:
                second = await deployment.started("worker")
            if number == 20:
                assert deployment.stop(second) == 0
            await asyncio.sleep(0.05)  # the load: reports every 50 ms
    await deployment.wait_for(expected)


async def test_events_and_batches_of_unequal_partitions_are_refused(deploy):
    deployment = await deploy()
    other = f"other.{deployment.run_id}"
    batches = load_topic_specs(names={"batches": other}, partitions=2)["batches"]
    create_topics(deployment.settings.client_config(), {"batches": batches})
    deployment.environment["AGENT_METADATA_BATCHES_TOPIC"] = other
    worker = deployment.start("worker")
    assert worker.wait(30) != 0
    assert f"has 4 partitions and {other} has 2" in deployment.log(worker)
    assert "Traceback" not in deployment.log(worker)


@pytest.mark.parametrize("size", [1_040_000, 4_000_000])
async def test_record_as_large_as_the_events_topic_takes_costs_itself_alone(deploy, size):
    deployment = await deploy(partitions=1)
    settings = deployment.settings
    config = {**settings.client_config(), "message.max.bytes": 10_000_000, "compression.type": "lz4"}
    if size < 1_048_576:
        config["compression.type"] = "none"
    agent = Producer(config)
    agent.produce(settings.events_topic, b"x" * size)
    assert agent.flush(10) == 0
    await deployment.started("worker")
    (letter,) = await eventually("it is a dead letter", lambda: consume_all(settings, settings.dead_letter_topic))
    assert letter.value() == b"x" * size
