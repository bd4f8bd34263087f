"""The listener against a real Postgres: snapshot, changes, and what was missed while the connection was down."""

import asyncio
import time
import uuid
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import asyncpg
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

import pipeline.listener
import pipeline.postgres.rows
from pipeline.core.notify import NOTIFY_CHANNEL, encode_agent_id
from pipeline.errors import ConfigError
from pipeline.listener import MetadataListener
from pipeline.local import PackagedPostgres
from pipeline.postgres.migrations import migrate

pytestmark = pytest.mark.services

T0 = datetime(2024, 1, 1, tzinfo=UTC)
A1, A2, A3 = (uuid.UUID(int=number) for number in (1, 2, 3))


class Heard:
    """What a listener yields, one change after the other."""

    def __init__(self, listener):
        self._changes = asyncio.Queue()
        self.task = asyncio.create_task(self._listen(listener))

    async def _listen(self, listener):
        async for change in listener.changes():
            self._changes.put_nowait(change)

    async def next(self):
        """Return the next change; raise what ended the listener."""
        getting = asyncio.create_task(self._changes.get())
        await asyncio.wait([getting, self.task], timeout=30, return_when=asyncio.FIRST_COMPLETED)
        if not getting.done():
            getting.cancel()
            if self.task.done():
                self.task.result()
            raise AssertionError("the listener yielded nothing")
        return getting.result()

    async def values(self, count):
        changes = [await self.next() for _ in range(count)]
        return [(change.agent_id, change.key, change.value) for change in changes]


@asynccontextmanager
async def hearing(listener):
    heard = Heard(listener)
    try:
        yield heard
    finally:
        heard.task.cancel()
        await asyncio.wait([heard.task], timeout=30)
        assert heard.task.done(), "the listener does not end when it is cancelled"


class Proxy:
    """A way to the database that can be closed for new connections, can go silent, and reports failed connections."""

    def __init__(self, database_url):
        self._target = urlsplit(database_url)
        self._user = self._target.netloc.rpartition("@")[0]
        self._writers = []
        self._silent = set()
        self.open = asyncio.Event()
        self.open.set()
        self.failed = asyncio.Event()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.url = self._target._replace(netloc=f"{self._user}@127.0.0.1:{port}").geturl()
        return self

    async def __aexit__(self, *_):
        self._server.close()
        for writer in self._writers:
            writer.close()

    def silence(self):
        """Stop carrying anything through the connections that are open now."""
        self._silent.update(self._writers)

    async def _serve(self, reader, writer):
        self._writers.append(writer)
        await self.open.wait()
        try:
            there, back = await asyncio.open_connection(self._target.hostname, self._target.port)
        except OSError:
            self.failed.set()
            writer.close()
            return
        self._writers.append(back)
        await asyncio.gather(self._carry(reader, back), self._carry(there, writer))

    async def _carry(self, reader, writer):
        with suppress(OSError):
            while data := await reader.read(65536):
                if writer not in self._silent:
                    writer.write(data)
        writer.close()


async def write(connection, agent_id, value, *, key="k", error="", at=0):
    await connection.execute(
        "insert into workspace_agent_metadata (workspace_agent_id, key, value, error, collected_at) "
        "values ($1, $2, $3, $4, $5) on conflict (workspace_agent_id, key) do update "
        "set value = excluded.value, error = excluded.error, collected_at = excluded.collected_at",
        *(agent_id, key, value, error, T0 + timedelta(seconds=at)),
    )


async def notify(connection, *agent_ids):
    payload = "".join(map(encode_agent_id, agent_ids))
    await connection.execute("select pg_notify($1, $2)", NOTIFY_CHANNEL, payload)


async def change(connection, agent_id, value, **options):
    async with connection.transaction():
        await write(connection, agent_id, value, **options)
        await notify(connection, agent_id)


async def cut_others(connection):
    """End all other connections to this database, and return when they are gone."""
    others = "from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()"
    assert await connection.fetchval(f"select bool_and(pg_terminate_backend(pid, 10000)) {others}")


async def test_changes_begin_with_a_snapshot(connection, database_url):
    await write(connection, A1, "one", key="a", error="late", at=3)
    await write(connection, A2, "two", key="b")
    async with hearing(MetadataListener(database_url)) as heard:
        assert [tuple(await heard.next()) for _ in range(2)] == [
            (A1, "a", "one", "late", T0 + timedelta(seconds=3), None, None),
            (A2, "b", "two", "", T0, None, None),
        ]


@pytest.mark.parametrize("rows_per_part", [1, 2, 3, 5, 6, 100])
async def test_snapshot_in_parts_has_each_row_once(connection, database_url, monkeypatch, rows_per_part):
    monkeypatch.setattr(pipeline.postgres.rows, "ROWS_PER_PART", rows_per_part)
    nil, last = uuid.UUID(int=0), uuid.UUID(int=2**128 - 1)
    pairs = [(nil, ""), (nil, "k"), (A1, "k"), (A2, "a"), (A2, "b"), (last, "z")]
    for agent_id, key in pairs:
        await write(connection, agent_id, "v", key=key)
    async with hearing(MetadataListener(database_url, deduplicate=False)) as heard:
        assert [(agent_id, key) for agent_id, key, _ in await heard.values(6)] == pairs
        await change(connection, A3, "new")
        assert await heard.values(1) == [(A3, "k", "new")]


async def test_more_notified_agents_than_are_remembered_are_all_heard(connection, database_url, monkeypatch):
    monkeypatch.setattr(pipeline.listener, "_MOST_NOTIFIED", 5)
    agents = [uuid.UUID(int=number) for number in range(20)]
    for agent_id in agents:
        await write(connection, agent_id, "old")
    async with hearing(MetadataListener(database_url)) as heard:
        await heard.values(20)
        async with connection.transaction():  # all at once
            for agent_id in agents:
                await change(connection, agent_id, "new", at=1)
        assert sorted(await heard.values(20)) == [(agent_id, "k", "new") for agent_id in agents]


async def test_agents_are_read_some_at_a_time(connection, database_url, monkeypatch):
    monkeypatch.setattr(pipeline.listener, "_AGENTS_PER_READ", 2)
    agents = [uuid.UUID(int=number) for number in range(5)]
    for agent_id in agents:
        await write(connection, agent_id, "old")
    async with hearing(MetadataListener(database_url, agents)) as heard:
        assert sorted(await heard.values(5)) == [(agent_id, "k", "old") for agent_id in agents]
        async with connection.transaction():
            for agent_id in agents:
                await change(connection, agent_id, "new", at=1)
        assert sorted(await heard.values(5)) == [(agent_id, "k", "new") for agent_id in agents]


async def test_without_deduplication_a_row_is_heard_again_and_its_age_is_the_newest_rows(connection, database_url):
    registry = CollectorRegistry()
    await write(connection, A1, "old", key="z")
    async with hearing(MetadataListener(database_url, deduplicate=False, registry=registry)) as heard:
        await heard.next()
        await change(connection, A1, "new", key="a", at=time.time() - T0.timestamp() - 100)
        assert await heard.values(2) == [(A1, "a", "new"), (A1, "z", "old")]
    assert 99 < registry.get_sample_value("agent_metadata_freshness_seconds_sum", {"hop": "notified"}) < 200


async def test_change_arrives_with_the_time_of_its_notify(connection, database_url):
    await write(connection, A1, "old")
    async with hearing(MetadataListener(database_url)) as heard:
        await heard.next()
        before = time.time()
        await change(connection, A1, "new", error="e", at=1)
        arrived = await heard.next()
    assert arrived[:5] == (A1, "k", "new", "e", T0 + timedelta(seconds=1))
    assert before <= arrived.notified_at <= time.time()


async def test_listener_counts_what_it_hears_and_how_old_it_is(connection, database_url):
    registry = CollectorRegistry()
    counting = MetadataListener(database_url, registry=registry)
    collected_s_after_t0 = time.time() - T0.timestamp() - 100
    await write(connection, A1, "a row of the snapshot has no such age")
    async with hearing(counting) as heard:
        await heard.next()
        await connection.execute("select pg_notify($1, 'garbage')", NOTIFY_CHANNEL)
        await change(connection, A1, "new", at=collected_s_after_t0)
        await heard.next()
        count, total = (
            registry.get_sample_value(f"agent_metadata_freshness_seconds_{name}", {"hop": "notified"})
            for name in ("count", "sum")
        )
        await write(connection, A1, "newer, and nobody is notified", at=collected_s_after_t0)
        await cut_others(connection)
        await heard.next()  # read after the cut
    assert count == 1
    assert 99 < total < 200
    counted = [
        registry.get_sample_value(f"agent_metadata_listener_{name}_total")
        for name in ("payloads", "ignored_payloads", "cuts")
    ]
    assert counted == [2, 1, 1]


async def test_snapshot_of_watched_agents_leaves_others_out(connection, database_url):
    for agent_id in (A1, A2, A3):
        await write(connection, agent_id, "v")
    async with hearing(MetadataListener(database_url, [A1, A3])) as heard:
        assert await heard.values(2) == [(A1, "k", "v"), (A3, "k", "v")]


async def test_change_of_an_agent_that_is_not_watched_is_not_heard(connection, database_url):
    await write(connection, A1, "old")
    async with hearing(MetadataListener(database_url, [A1])) as heard:
        await heard.next()
        await change(connection, A2, "unwatched")
        await change(connection, A1, "watched")
        assert await heard.values(1) == [(A1, "k", "watched")]


async def test_row_that_did_not_change_is_not_repeated(connection, database_url):
    await write(connection, A1, "same")
    await write(connection, A1, "old", key="other")
    async with hearing(MetadataListener(database_url)) as heard:
        await heard.values(2)
        await notify(connection, A1)
        await change(connection, A1, "new", key="other")
        assert await heard.values(1) == [(A1, "other", "new")]


async def test_row_with_a_new_time_only_is_a_change(connection, database_url):
    await write(connection, A1, "same")
    async with hearing(MetadataListener(database_url)) as heard:
        await heard.next()
        await change(connection, A1, "same", at=1)
        assert (await heard.next()).collected_at == T0 + timedelta(seconds=1)


async def test_payload_of_garbage_is_ignored_and_the_next_one_heard(connection, database_url):
    await write(connection, A1, "old")
    with capture_logs() as logs:
        async with hearing(MetadataListener(database_url)) as heard:
            await heard.next()
            for garbage in ("x", "!" * 22, "ä" * 22, ""):
                await connection.execute("select pg_notify($1, $2)", NOTIFY_CHANNEL, garbage)
            await change(connection, A1, "new")
            assert await heard.values(1) == [(A1, "k", "new")]
    assert [entry["event"] for entry in logs] == ["notify_ignored"] * 3


async def test_listener_catches_up_with_what_changed_while_it_was_cut_off(connection, database_url):
    await write(connection, A1, "old")
    await write(connection, A2, "same")
    async with Proxy(database_url) as proxy, hearing(MetadataListener(proxy.url)) as heard:
        await heard.values(2)
        proxy.open.clear()
        await cut_others(connection)
        await change(connection, A1, "missed", at=1)
        proxy.open.set()
        caught_up = await heard.next()
        assert (caught_up.agent_id, caught_up.value, caught_up.notified_at) == (A1, "missed", None)
        await change(connection, A2, "live")
        assert await heard.values(1) == [(A2, "k", "live")]


async def test_listener_cut_again_and_again_ends_with_every_last_value(connection, database_url):
    await write(connection, A1, "0")
    async with hearing(MetadataListener(database_url, [A1])) as heard:
        for number in range(1, 6):
            await heard.next()
            await cut_others(connection)
            await change(connection, A1, str(number), at=number)
        assert await heard.values(1) == [(A1, "k", "5")]


async def test_connection_that_falls_silent_is_given_up_and_replaced(connection, database_url, monkeypatch):
    monkeypatch.setattr(pipeline.listener, "_KEEPALIVE_SECONDS", 0.1)
    monkeypatch.setattr(pipeline.listener, "_ANSWER_SECONDS", 0.5)
    await write(connection, A1, "old")
    async with Proxy(database_url) as proxy, hearing(MetadataListener(proxy.url)) as heard:
        await heard.next()
        proxy.silence()
        await change(connection, A1, "new")
        assert await heard.values(1) == [(A1, "k", "new")]


async def test_database_that_refuses_the_listener_ends_it(database_url):
    elsewhere = urlsplit(database_url)._replace(path="/no_such_database").geturl()
    async with hearing(MetadataListener(elsewhere)) as heard:
        with pytest.raises(ConfigError, match="3D000"):
            await heard.next()


@pytest.fixture(scope="module")
def own_postgres():
    """A Postgres that a test may stop."""
    with PackagedPostgres() as server:
        yield server


@asynccontextmanager
async def connected_to(server):
    connection = await asyncpg.connect(server.database_url)
    try:
        await migrate(connection)
        yield connection
    finally:
        await connection.close()


async def test_connecting_to_a_database_that_is_down_is_retried(own_postgres):
    async with connected_to(own_postgres) as connection:
        await write(connection, A1, "before")
    await asyncio.to_thread(own_postgres.stop)
    async with Proxy(own_postgres.database_url) as proxy, hearing(MetadataListener(proxy.url, [A1])) as heard:
        await asyncio.wait_for(proxy.failed.wait(), 30)
        await asyncio.to_thread(own_postgres.start)
        assert await heard.values(1) == [(A1, "k", "before")]


async def test_listener_lives_through_a_restart_of_the_database(own_postgres):
    async with connected_to(own_postgres) as connection:
        await write(connection, A2, "before")
    async with Proxy(own_postgres.database_url) as proxy, hearing(MetadataListener(proxy.url, [A2])) as heard:
        await heard.next()
        await asyncio.to_thread(own_postgres.stop)
        await asyncio.wait_for(proxy.failed.wait(), 30)
        await asyncio.to_thread(own_postgres.start)
        async with connected_to(own_postgres) as connection:
            await change(connection, A2, "after", at=1)
        assert await heard.values(1) == [(A2, "k", "after")]
