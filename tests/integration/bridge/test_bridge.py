"""The bridge reads each change of coder's table, whoever wrote it and whatever its time, and sends it once."""

import asyncio
import uuid
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import asyncpg
import pytest
from prometheus_client import CollectorRegistry

import pipeline.bridge.bridge
from pipeline.bridge import Bridge, require_another_table
from pipeline.core.report import MAX_KEY_CHARS, decode_report
from pipeline.errors import ConfigError, PipelineError
from pipeline.monitoring.metrics import BridgeMetrics
from pipeline.postgres.migrations import migrate
from tests.support.coder import CODERS_TABLES, CoderReplica, declare
from tests.support.deployment import eventually

pytestmark = pytest.mark.services

A1, A2, A3 = (uuid.UUID(int=number) for number in range(0xA1, 0xA4))
T0 = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
RARELY = 3600.0


class Topic:
    """What a Publisher is to the bridge; it acknowledges while `answers`."""

    def __init__(self):
        self.records = []
        self.answers = asyncio.Event()
        self.answers.set()

    async def send(self, topic, value, *, key):
        assert topic == "events"
        self.records.append((key, value))
        return asyncio.ensure_future(self.answers.wait())

    def reports(self):
        """Return the reports so far, as the worker reads them; none is cut or left out."""
        decoded = [decode_report(value) for _, value in self.records]
        assert [problem for _, problem in decoded if problem] == []
        assert [key.decode() for key, _ in self.records] == [report.agent_id for report, _ in decoded]
        return [report for report, _ in decoded]

    def values(self):
        """Return (agent, key, value) of each entry so far."""
        return [
            (uuid.UUID(report.agent_id), entry.key, entry.value)
            for report in self.reports()
            for entry in report.entries
        ]


class Following:
    """A bridge that runs."""

    def __init__(self, topic, registry):
        self.topic = topic
        self._registry = registry

    def metric(self, name):
        return self._registry.get_sample_value(f"agent_metadata_{name}")

    async def values(self, count):
        """Wait for so many entries; return and forget them."""
        await eventually(f"{count} entries", lambda: len(self.topic.values()) >= count, 20)
        values = self.topic.values()
        self.topic.records.clear()
        return values

    async def looked(self):
        """Wait until the bridge has looked through the table once more, from now on."""
        for _ in range(2):  # the first may have begun before
            lag = self.metric("bridge_lag_seconds")
            await eventually("a look", lambda lag=lag: self.metric("bridge_lag_seconds") < lag, 20)


@asynccontextmanager
async def following(url, *, poll_seconds=0.1):
    topic, registry = Topic(), CollectorRegistry()
    bridge = Bridge(url, publisher=topic, topic="events", poll_seconds=poll_seconds, metrics=BridgeMetrics(registry))
    running = asyncio.create_task(bridge.run())
    try:
        await eventually("the table is sent", lambda: running.done() or bridge.why_not_ready() is None, 20)
        yield Following(topic, registry)
        if running.done():
            running.result()
    finally:
        running.cancel()
        await asyncio.wait([running])


@pytest.fixture
async def coder(database_url):
    """A connection to coder's database, in which two agents have declared two keys each and reported nothing."""
    connection = await asyncpg.connect(database_url)
    await connection.execute(CODERS_TABLES)
    await connection.execute("delete from workspace_agents")
    await declare(connection, [A1, A2], ["cpu", "mem"])
    yield connection
    await connection.close()


async def write(connection, agent_id, key, value, at=T0, error=""):
    done = await connection.execute(
        "update workspace_agent_metadata set value = $3, error = $4, collected_at = $5"
        " where workspace_agent_id = $1 and key = $2",
        *(agent_id, key, value, error, at),
    )
    assert done == "UPDATE 1"


async def test_start_sends_what_was_collected_with_its_time_and_error(coder, database_url):
    await write(coder, A1, "cpu", "12%")
    await write(coder, A1, "mem", "", T0 + timedelta(microseconds=1), "timed out")
    async with following(database_url, poll_seconds=RARELY) as bridge:
        (report,) = bridge.topic.reports()
        assert report.agent_id == str(A1)
        assert [(entry.key, entry.value, entry.error, entry.collected_at) for entry in report.entries] == [
            ("cpu", "12%", "", T0),
            ("mem", "", "timed out", T0 + timedelta(microseconds=1)),
        ]
        assert (bridge.metric("bridge_rows_total"), bridge.metric("bridge_reports_total")) == (2, 1)


LATE = {
    "newer": timedelta(seconds=1),
    "as old as the newest seen": timedelta(0),
    "older than the newest seen": timedelta(hours=-1),
}


@pytest.mark.parametrize("ago", LATE.values(), ids=LATE)
async def test_change_is_sent_whatever_its_time(coder, database_url, ago):
    await write(coder, A1, "cpu", "old", T0 - timedelta(hours=2))
    await write(coder, A2, "cpu", "newest seen")
    async with following(database_url) as bridge:
        await bridge.values(2)
        await write(coder, A1, "cpu", "late", T0 + ago)
        assert await bridge.values(1) == [(A1, "cpu", "late")]


async def test_another_value_at_the_same_time_and_a_time_that_goes_back_are_sent(coder, database_url):
    await write(coder, A1, "cpu", "one")
    async with following(database_url) as bridge:
        await bridge.values(1)
        await write(coder, A1, "cpu", "two")
        assert await bridge.values(1) == [(A1, "cpu", "two")]
        await write(coder, A1, "cpu", "back", T0 - timedelta(days=1))
        assert await bridge.values(1) == [(A1, "cpu", "back")]


@pytest.mark.parametrize("savepoint", [False, True])
async def test_transaction_that_was_open_during_looks_is_not_missed(coder, database_url, savepoint):
    slow = await asyncpg.connect(database_url)
    async with following(database_url) as bridge:
        transaction = slow.transaction()
        await transaction.start()
        await slow.fetchval("select pg_current_xact_id()")
        if savepoint:
            await slow.execute("savepoint inner_one")
        await write(slow, A1, "cpu", "slow")
        await write(coder, A2, "cpu", "quick")
        assert await bridge.values(1) == [(A2, "cpu", "quick")]
        await bridge.looked()
        assert bridge.topic.records == []  # what was sent is not sent again, though a transaction is open
        await transaction.commit()
        assert await bridge.values(1) == [(A1, "cpu", "slow")]
        await bridge.looked()
        assert bridge.topic.records == []
    await slow.close()


async def test_unchanged_declared_and_deleted_rows_are_not_sent(coder, database_url):
    await write(coder, A1, "cpu", "12%")
    async with following(database_url) as bridge:
        await bridge.values(1)
        await declare(coder, [A3], ["cpu"])
        await coder.execute("delete from workspace_agents where id = $1", A1)  # and so its rows
        await coder.execute("vacuum full workspace_agent_metadata")
        await bridge.looked()
        assert bridge.topic.records == []


async def test_notified_agents_are_read_at_once(coder, database_url):
    replica = CoderReplica(database_url, notifies=True)
    async with following(database_url, poll_seconds=RARELY) as bridge:
        replica.add(A1, "cpu", "12%", T0)
        replica.add(A2, "mem", "1 GB", T0)
        await replica.flush()
        assert sorted(await bridge.values(2)) == [(A1, "cpu", "12%"), (A2, "mem", "1 GB")]
        await coder.execute("select pg_notify('workspace_agent_metadata_batch', 'not agent ids')")
        replica.add(A1, "cpu", "13%", T0)
        await replica.flush()
        assert await bridge.values(1) == [(A1, "cpu", "13%")]


async def test_more_agents_than_are_read_at_a_time_are_all_sent(coder, database_url, monkeypatch):
    monkeypatch.setattr(pipeline.bridge.bridge, "_AGENTS_PER_READ", 3)
    agents = [uuid.UUID(int=number) for number in range(1, 11)]
    await declare(coder, agents, ["cpu"])
    for agent_id in agents:
        await write(coder, agent_id, "cpu", "old")
    async with following(database_url) as bridge:
        assert sorted(await bridge.values(10)) == [(agent_id, "cpu", "old") for agent_id in agents]


async def test_agent_with_many_long_keys_is_sent_in_reports_that_the_worker_takes_whole(coder, database_url):
    keys = [f"{number:03}".ljust(MAX_KEY_CHARS, "\N{SNOWMAN}") for number in range(70)]
    await declare(coder, [A3], keys)
    for key in keys:
        await write(coder, A3, key, "\x01" * 2048, error="\x01" * 2048)
    async with following(database_url) as bridge:
        assert [key for _, key, _ in await bridge.values(len(keys))] == keys


async def test_values_that_coder_would_have_cut_are_cut(coder, database_url):
    await write(coder, A1, "cpu", "x" * 5000)
    async with following(database_url) as bridge:
        (report,) = bridge.topic.reports()
        assert report.entries[0].value == "x" * 2048
        assert report.entries[0].error == "value of 5000 bytes exceeded 2048 bytes"


async def test_what_is_not_acknowledged_is_not_passed(coder, database_url):
    async with following(database_url) as bridge:
        bridge.topic.answers.clear()
        await write(coder, A1, "cpu", "1")
        assert await bridge.values(1) == [(A1, "cpu", "1")]
        await write(coder, A2, "cpu", "2")
        await asyncio.sleep(0.5)  # five looks
        assert bridge.topic.records == []
        assert bridge.metric("bridge_lag_seconds") > 0.4
        bridge.topic.answers.set()
        assert await bridge.values(1) == [(A2, "cpu", "2")]


async def test_lost_connection_is_replaced_and_the_table_sent_again(coder, database_url):
    await write(coder, A1, "cpu", "12%")
    async with following(database_url, poll_seconds=RARELY) as bridge:
        await bridge.values(1)
        others = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
        assert await coder.fetchval(f"select bool_and(pg_terminate_backend(pid, 10000)) {others}")
        assert await bridge.values(1) == [(A1, "cpu", "12%")]
        assert bridge.metric("bridge_cuts_total") == 1


async def test_missing_table_is_named(database_url):
    with pytest.raises(ConfigError, match=r"no workspace_agent_metadata where AGENT_METADATA_BRIDGE_DATABASE_URL"):
        async with following(database_url):
            pass


def by(url, *, host="", search_path=""):
    parts = urlsplit(url)
    netloc = parts.netloc.replace(str(parts.hostname), host) if host else parts.netloc
    return parts._replace(netloc=netloc, query=f"search_path={search_path}" if search_path else "").geturl()


async def test_pipelines_own_table_is_refused_by_whatever_address(coder, database_url):
    for url in (database_url, by(database_url, host="localhost"), by(database_url, search_path="nonesuch,public")):
        with pytest.raises(ConfigError, match="lead to the same table"):
            await require_another_table(database_url, url)


async def test_another_schema_and_another_database_are_taken(coder, database_url, services):
    await coder.execute("create schema shadow")
    shadow = by(database_url, search_path="shadow")
    await require_another_table(database_url, shadow)  # not migrated yet
    connection = await asyncpg.connect(shadow)
    await migrate(connection)
    await connection.close()
    await require_another_table(database_url, shadow)
    await require_another_table(database_url, services.database_url)


async def test_same_table_id_in_another_database_is_another_table(coder, database_url):
    """As in a database that was made from a copy of coder's."""
    copied = f"{urlsplit(database_url).path[1:]}_copy"
    await coder.close()
    server = await asyncpg.connect(urlsplit(database_url)._replace(path="/postgres").geturl())
    try:
        await server.execute(f'create database "{copied}" template "{urlsplit(database_url).path[1:]}"')
        await require_another_table(database_url, urlsplit(database_url)._replace(path=f"/{copied}").geturl())
    finally:
        await server.execute(f'drop database if exists "{copied}" with (force)')
        await server.close()


async def test_kafkas_refusal_ends_the_bridge(coder, database_url):
    class Refusing(Topic):
        async def send(self, topic, value, *, key):
            future = asyncio.get_running_loop().create_future()
            future.set_exception(PipelineError("Kafka refused a record"))
            return future

    await write(coder, A1, "cpu", "12%")
    bridge = Bridge(
        database_url,
        publisher=Refusing(),
        topic="events",
        poll_seconds=RARELY,
        metrics=BridgeMetrics(CollectorRegistry()),
    )
    with pytest.raises(PipelineError, match="Kafka refused a record"):
        await bridge.run()
