"""The migration runner against a real Postgres."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import asyncpg
import pytest

from pipeline.errors import ConfigError, SchemaMismatch, ServiceUnavailable
from pipeline.postgres.migrations import migrate, migration_status, require_schema
from tests.support.coder import CODERS_TABLES
from tests.support.deployment import eventually

pytestmark = pytest.mark.services

ALL = ["0001_metadata", "0002_progress", "0003_epoch", "0004_names"]
A1 = "00000000-0000-0000-0000-000000000001"


@asynccontextmanager
async def connected(database_url, **settings):
    connection = await asyncpg.connect(database_url, server_settings=settings)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def connection(database_url):
    async with connected(database_url) as connection:
        yield connection


async def persistence(connection):
    """Return p for a LOGGED table, u for an UNLOGGED one."""
    query = "select relpersistence from pg_class where oid = 'workspace_agent_metadata'::regclass"
    return (await connection.fetchval(query)).decode()


async def test_migrate_applies_all_in_order_once(connection):
    assert await migrate(connection) == ALL
    assert await migrate(connection) == []
    await require_schema(connection)


async def test_migrate_four_at_once_applies_each_once(database_url, connection):
    async with AsyncExitStack() as stack:
        others = [await stack.enter_async_context(connected(database_url)) for _ in range(3)]
        applied = await asyncio.gather(*(migrate(each) for each in (connection, *others)))
    assert sorted(applied) == [[], [], [], ALL]
    assert await connection.fetchval("select count(*) from agent_metadata_migrations") == len(ALL)


async def test_migrate_waits_for_a_run_under_way_and_lets_the_next_one_go_on(database_url, connection):
    await migrate(connection)
    async with connected(database_url) as first, connected(database_url) as second, connected(database_url) as watching:
        await connection.execute("begin; lock table agent_metadata_migrations")  # holds the first run up
        runs = [asyncio.create_task(migrate(first))]
        await eventually("the first run has the lock", lambda: advisory_locks(watching, granted=True))
        runs.append(asyncio.create_task(migrate(second)))
        await eventually("the second run waits for it", lambda: advisory_locks(watching, granted=False))
        await connection.execute("commit")
        assert await asyncio.gather(*runs) == [[], []]
        assert await advisory_locks(watching, granted=True) == 0


async def advisory_locks(connection, *, granted):
    return await connection.fetchval(
        "select count(*) from pg_locks where locktype = 'advisory' and granted = $1"
        " and database = (select oid from pg_database where datname = current_database())",
        granted,
    )


async def test_a_migration_that_fails_leaves_nothing_behind_and_can_be_tried_again(connection):
    await connection.execute("create table agent_metadata_progress (in_the_way integer)")
    with pytest.raises(ConfigError, match="agent_metadata_progress"):
        await migrate(connection)
    assert [item.name for item in await migration_status(connection) if item.applied_at] == []
    await connection.execute("drop table agent_metadata_progress")
    assert await migrate(connection) == ALL


async def test_changed_migration_is_refused_by_name(connection):
    await migrate(connection)
    await connection.execute("update agent_metadata_migrations set checksum = 'another' where version = 2")
    for check in (migrate, require_schema):
        with pytest.raises(SchemaMismatch, match=r"^0002_progress changed after being applied"):
            await check(connection)
    assert [item.changed for item in await migration_status(connection)] == [False, True, False, False]


async def test_status_before_and_after(connection):
    before = await migration_status(connection)
    assert [(item.version, item.name, item.applied_at, item.changed) for item in before] == [
        (1, "0001_metadata", None, False),
        (2, "0002_progress", None, False),
        (3, "0003_epoch", None, False),
        (4, "0004_names", None, False),
    ]
    await migrate(connection)
    assert all(item.applied_at and not item.changed for item in await migration_status(connection))


async def test_require_schema_of_an_empty_database_names_what_is_missing_and_the_command(connection):
    with pytest.raises(SchemaMismatch, match="agent-metadata db migrate") as caught:
        await require_schema(connection)
    assert all(name in str(caught.value) for name in ALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "table", ["workspace_agent_metadata", "agent_metadata_progress", "agent_metadata_epoch", "agent_metadata_names"]
)
async def test_table_that_is_gone_is_named_and_can_be_had_again_as_said(connection, table):
    await migrate(connection)
    await connection.execute(f"drop table {table}")
    for check in (migrate, require_schema):
        with pytest.raises(SchemaMismatch, match=f"^{table} is gone"):
            await check(connection)
    await connection.execute(f"delete from agent_metadata_migrations where name like '%{table.split('_')[-1]}'")
    assert len(await migrate(connection)) == 1
    await require_schema(connection)


async def test_insert_of_a_value_needs_no_definition(connection):
    await migrate(connection)
    await connection.execute(
        "insert into workspace_agent_metadata (workspace_agent_id, key, value, error, collected_at)"
        " values ($1, 'cpu', '12%', '', now())",
        A1,
    )
    row = await connection.fetchrow("select display_name, script, timeout, interval from workspace_agent_metadata")
    assert tuple(row) == ("", "", 0, 0)


async def test_row_rewritten_in_place_does_not_touch_the_index(connection):
    await migrate(connection)
    await connection.execute("insert into workspace_agent_metadata (workspace_agent_id, key) values ($1, 'cpu')", A1)
    async with connection.transaction():
        for number in range(10):
            await connection.execute("update workspace_agent_metadata set value = $1", str(number))
        in_place = "select pg_stat_get_xact_tuples_hot_updated('workspace_agent_metadata'::regclass)"
        assert await connection.fetchval(in_place) == 10


async def test_unlogged_and_back(connection):
    await migrate(connection)
    assert await persistence(connection) == "p"
    await migrate(connection, unlogged=True)
    assert await persistence(connection) == "u"
    await migrate(connection)
    assert await persistence(connection) == "p"


async def test_coders_own_table_is_left_as_it_is(connection):
    await connection.execute(CODERS_TABLES)
    before = await described(connection)
    assert await migrate(connection) == ALL
    assert await described(connection) == before
    assert await persistence(connection) == "u"
    assert await connection.fetchval("select value from workspace_agent_metadata") == "12%"


async def described(connection):
    return await connection.fetch(
        "select attname, atttypid, atttypmod, attnotnull, atthasdef from pg_attribute"
        " where attrelid = 'workspace_agent_metadata'::regclass and attnum > 0 order by attnum"
    )


async def test_tables_are_made_in_the_schema_of_the_search_path(database_url, connection):
    await connection.execute("create schema ours")
    async with connected(database_url, search_path="ours") as in_ours:
        assert await migrate(in_ours) == ALL
        await require_schema(in_ours)
    with pytest.raises(SchemaMismatch):
        await require_schema(connection)
    tables = await connection.fetch("select schemaname from pg_stat_user_tables")
    assert {row["schemaname"] for row in tables} == {"ours"}


async def test_read_only_server_is_an_outage(database_url):
    async with connected(database_url, default_transaction_read_only="on") as standby:
        with pytest.raises(ServiceUnavailable, match="25006"):
            await migrate(standby)
