"""The rights that sql/grants.sql gives suffice for each role's work, are all needed, and are all that it gives."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import asyncpg
import pytest

from pipeline.bridge.coder_table import EVERYTHING, CoderTable
from pipeline.core.batch import Batch, Columns, Source, WindowSpan
from pipeline.core.report import agent_uuid
from pipeline.errors import PipelineError
from pipeline.kafka.topics import create_topics
from pipeline.local.postgres import postgres_binaries
from pipeline.local.process import free_port
from pipeline.postgres.connections import connected
from pipeline.postgres.migrations import migrate, require_schema
from pipeline.postgres.progress import PartitionId, Received
from pipeline.postgres.rows import read_all_rows
from pipeline.postgres.statements import statement
from pipeline.postgres.store import Store
from tests.support.coder import CODERS_TABLES
from tests.support.deployment import Deployment, ask, eventually
from tests.support.documentation import ROOT, table_rows

pytestmark = pytest.mark.services

ROLES = ("migrate", "sink", "refill", "serve", "status", "bridge")
AFTER_MIGRATION = ROLES[1:]
TABLES = (
    "workspace_agent_metadata",
    "agent_metadata_progress",
    "agent_metadata_epoch",
    "agent_metadata_names",
    "agent_metadata_migrations",
)
AGENT = uuid.UUID(agent_uuid("host-17"))
NAMES = {str(AGENT): "host-17"}
PASSWORD = "rights"


class Right(NamedTuple):
    """One right of one role, as the catalog has it; `columns` are empty for a right to a whole object."""

    kind: str
    name: str
    privilege: str
    columns: str = ""

    def sql(self) -> str:
        columns = f" ({self.columns})" if self.columns else ""
        return f'{self.privilege}{columns} on {self.kind} "{self.name}"'


class Database:
    """A database in which PUBLIC may do nothing, and a user for each role: no superuser, and no owner."""

    def __init__(self, url: str, admin: asyncpg.Connection) -> None:
        self.url = url
        self.admin = admin
        self._suffix = uuid.uuid4().hex[:8]

    def user(self, role: str) -> str:
        return f"{role}-{self._suffix}"  # a name that has to be quoted

    def url_of(self, role: str) -> str:
        parts = urlsplit(self.url)
        return parts._replace(netloc=f"{self.user(role)}:{PASSWORD}@{parts.hostname}:{parts.port}").geturl()

    async def prepare(self) -> None:
        name = urlsplit(self.url).path[1:]
        await self.admin.execute(
            f'revoke all on database "{name}" from public; revoke all on schema public from public'
        )
        await self.admin.execute("create table secrets (secret text); insert into secrets values ('x')")
        for role in ROLES:
            await self.admin.execute(f"create role \"{self.user(role)}\" login password '{PASSWORD}'")

    async def drop_users(self) -> None:
        for role in ROLES:
            await self.admin.execute(f'drop owned by "{self.user(role)}" cascade')
            await self.admin.execute(f'drop role "{self.user(role)}"')

    async def grant(self, *roles: str) -> None:
        """Run the script by psql, as docs/settings.md says."""
        names = [f"--set={role}={self.user(role)}" for role in roles]
        psql = [postgres_binaries() / "psql", "--no-psqlrc", self.url, *names, "--file", ROOT / "sql/grants.sql"]
        done = await asyncio.to_thread(subprocess.run, psql, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    async def migrate(self) -> None:
        await self.grant("migrate")
        async with connected(self.url_of("migrate")) as connection:
            await migrate(connection)
        await self.grant(*AFTER_MIGRATION)

    async def rights(self, role: str) -> set[Right]:
        """Return everything that the catalog grants to a role's user, other than as an owner."""
        rows = await self.admin.fetch(RIGHTS, self.user(role))
        return {Right(*row) for row in rows}


RIGHTS = """
with held as (
    select 'table' as kind, relname::text as name, relowner as owner, acl.*, '' as columns
    from pg_class, aclexplode(relacl) as acl
    union all
    select 'table', relname::text, relowner, acl.*, attname::text
    from pg_attribute join pg_class on pg_class.oid = attrelid, aclexplode(attacl) as acl
    union all
    select 'schema', nspname::text, nspowner, acl.*, '' from pg_namespace, aclexplode(nspacl) as acl
    union all
    select 'database', datname::text, datdba, acl.*, '' from pg_database, aclexplode(datacl) as acl
)
select kind, name, privilege_type, columns
from held where grantee = (select oid from pg_roles where rolname = $1) and owner <> grantee
"""


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    admin = await asyncpg.connect(database_url)
    made = Database(database_url, admin)
    await made.prepare()
    yield made
    await made.drop_users()
    await admin.close()


def documented(role: str, database: str) -> set[Right]:
    """Return the rights in a role's row of the table, such as `SELECT, UPDATE (value, error)`."""
    rows = {name: cells for name, _, *cells in table_rows("docs/settings.md", "Rights in Postgres")}
    schema, *cells = rows[f"`{role}`"]
    found = {Right("database", database, "CONNECT")}
    found |= {Right("schema", "public", privilege) for privilege in schema.split(", ")}
    for table, cell in zip(TABLES, cells, strict=True):
        for privilege, columns in re.findall(r"([A-Z]+)(?: \(([a-z_, ]+)\))?", cell):
            found |= {Right("table", table, privilege, column) for column in columns.split(", ")}
    return found


async def test_script_grants_what_the_table_in_the_docs_says_and_no_more(database):
    await database.migrate()
    await database.grant(*AFTER_MIGRATION)  # again, which changes nothing
    name = urlsplit(database.url).path[1:]
    for role in ROLES:
        assert await database.rights(role) == documented(role, name), role


async def work_of_migrate(url: str) -> None:
    async with connected(url) as connection:
        await migrate(connection)


async def work_of_sink(url: str) -> None:
    """A batch of a new row and one of a newer value, each in a partition's own order; then the check for an epoch."""
    async with opened_store(url) as store:
        target = PartitionId(uuid.uuid4().hex, 0, "batches")
        for offset in range(2):
            at = await store.next_offsets(target.topic_id, [0])
            received = Received(at.get(0, 0), batch(offset, target.topic_id))
            await store.apply(target, [received], refuse_nothing)
        await store.epoch.is_emptied()
        await refill(store, 2)


async def work_of_refill(url: str) -> None:
    async with opened_store(url) as store:
        await refill(store, 0)


@asynccontextmanager
async def opened_store(url: str) -> AsyncIterator[Store]:
    async with connected(url) as connection:
        await require_schema(connection)
    store = await Store.connect(url, connections=2, undeclared="insert", notify=True)
    try:
        yield store
    finally:
        await store.close()


async def refill(store: Store, number: int) -> None:
    async with store.epoch.refilling() as is_ours:
        assert is_ours
        await store.replay(batch(number, "").columns, NAMES, refuse_nothing)


async def work_of_serve(url: str) -> None:
    async with connected(url) as connection:
        await require_schema(connection)
        assert [part async for part in read_all_rows(connection)]


async def work_of_status(url: str) -> None:
    async with connected(url) as connection:
        await require_schema(connection)
        await connection.fetch(statement("status_progress"), "id")
        await connection.fetch(statement("read_epoch"))
        await connection.fetch(statement("status_table"), 1.0, 5)
        await connection.fetch(statement("read_row"), AGENT, "cpu")


async def work_of_bridge(url: str) -> None:
    async with CoderTable.opened(url) as table:
        await table.horizon()
        await table.rows(await table.changed_agents(EVERYTHING), EVERYTHING)


WORK: dict[str, Callable[[str], Awaitable[None]]] = {
    "migrate": work_of_migrate,
    "sink": work_of_sink,
    "refill": work_of_refill,
    "serve": work_of_serve,
    "status": work_of_status,
    "bridge": work_of_bridge,
}


def batch(number: int, topic_id: str) -> Batch:
    source = Source("events", f"events of {topic_id}", 0, number, number)
    columns = Columns([str(AGENT)], ["cpu"], [f"{number}%"], [""], [1_704_067_200_000_000 + number])
    return Batch(source, WindowSpan(0, 1), "scheduled", 1, 1, *columns, names=NAMES)


async def refuse_nothing(row: Any, error: Exception) -> Awaitable[None]:
    raise AssertionError(f"{row} was rejected: {error}")


@pytest.mark.parametrize("role", ROLES)
async def test_work_of_a_role_succeeds_with_its_rights_and_fails_without_any_of_them(database, role):
    await database.grant("migrate")
    if role != "migrate":
        await database.migrate()
        await WORK[role](database.url_of(role))
    user = database.user(role)
    for right in await database.rights(role):
        await database.admin.execute(f'revoke {right.sql()} from "{user}"')
        with pytest.raises((PipelineError, asyncpg.InsufficientPrivilegeError)):
            await WORK[role](database.url_of(role))
        await database.admin.execute(f'grant {right.sql()} to "{user}"')
        if role != "migrate":
            await database.admin.execute("delete from workspace_agent_metadata")  # so that the next inserts again
    await WORK[role](database.url_of(role))


FORBIDDEN = {
    "sink": (
        "create table mine ()",
        "alter table workspace_agent_metadata set unlogged",
        "truncate workspace_agent_metadata",
        "delete from workspace_agent_metadata",
        "update workspace_agent_metadata set script = 'x'",
        "insert into workspace_agent_metadata (workspace_agent_id, key, script) values (gen_random_uuid(), 'k', 'x')",
        "delete from agent_metadata_progress",
        "delete from agent_metadata_migrations",
        "update agent_metadata_names set name = 'x'",
    ),
    "refill": (
        "create table mine ()",
        "delete from workspace_agent_metadata",
        "update workspace_agent_metadata set script = 'x'",
        "select * from agent_metadata_progress",
    ),
    "serve": (
        "update workspace_agent_metadata set value = 'x'",
        "insert into workspace_agent_metadata (workspace_agent_id, key) values (gen_random_uuid(), 'k')",
        "delete from workspace_agent_metadata",
        "insert into agent_metadata_names values (gen_random_uuid(), 'x')",
        "select * from agent_metadata_progress",
        "create table mine ()",
    ),
    "status": (
        "update workspace_agent_metadata set value = 'x'",
        "update agent_metadata_progress set next_offset = 0",
        "delete from agent_metadata_epoch",
        "create table mine ()",
    ),
    "bridge": (
        "select script from workspace_agent_metadata",
        "update workspace_agent_metadata set value = 'x'",
        "insert into workspace_agent_metadata (workspace_agent_id, key) values (gen_random_uuid(), 'k')",
        "delete from workspace_agent_metadata",
        "select * from agent_metadata_migrations",
        "create table mine ()",
    ),
}


@pytest.mark.parametrize("role", FORBIDDEN)
async def test_role_may_do_nothing_else(database, role):
    await database.migrate()
    connection = await asyncpg.connect(database.url_of(role))
    try:
        for sql in ("select * from secrets", *FORBIDDEN[role]):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(sql)
    finally:
        await connection.close()


async def test_coders_own_table_stays_coders(database):
    """The sink updates it without owning it, or being able to write the scripts that coder has agents run."""
    await database.admin.execute(CODERS_TABLES)
    await database.migrate()
    assert await database.admin.fetchval(
        "select pg_get_userbyid(relowner) from pg_class where relname = 'workspace_agent_metadata'"
    ) == await database.admin.fetchval("select current_user")
    store = await Store.connect(database.url_of("sink"), connections=1, undeclared="ignore", notify=True)
    try:
        source, agent = Source("events", "id", 0, 0, 0), "00000000-0000-0000-0000-000000000001"
        rows = Columns([agent, agent], ["cpu", "undeclared"], ["99%", "x"], ["", ""], [1_704_067_200_000_000] * 2)
        newer = Batch(source, WindowSpan(0, 1), "scheduled", 1, 1, *rows)
        applied = await store.apply(PartitionId("b", 0, "batches"), [Received(0, newer)], refuse_nothing)
        assert applied.written.rows == 1
        # What docs/settings.md says of INSERT with UNDECLARED=ignore.
        columns = "workspace_agent_id, key, value, error, collected_at"
        user = database.user("sink")
        await database.admin.execute(f'revoke insert ({columns}) on workspace_agent_metadata from "{user}"')
        await store.apply(PartitionId("b", 0, "batches"), [Received(1, newer)], refuse_nothing)
        with pytest.raises(PipelineError, match="permission denied"):
            await store.replay(newer.columns, {}, refuse_nothing)
    finally:
        await store.close()
    await work_of_migrate(database.url_of("migrate"))
    await database.admin.execute("alter table workspace_agent_metadata set logged")
    async with connected(database.url_of("migrate")) as connection:
        with pytest.raises(PipelineError, match="must be owner"):
            await migrate(connection, unlogged=True)


async def test_bridge_reads_coders_own_table_without_the_scripts_in_it(database):
    await database.admin.execute(CODERS_TABLES)
    await database.admin.execute("update workspace_agent_metadata set collected_at = now()")
    await database.grant("bridge")  # there are no other tables of ours
    async with CoderTable.opened(database.url_of("bridge")) as table:
        (row,) = await table.rows(await table.changed_agents(EVERYTHING), EVERYTHING)
    assert (row.key, row.value) == ("cpu", "12%")
    connection = await asyncpg.connect(database.url_of("bridge"))
    try:
        for sql in ("select script from workspace_agent_metadata", "select * from workspace_agents"):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(sql)
    finally:
        await connection.close()


@pytest.fixture
async def deployment(database: Database, bootstrap_servers: str, tmp_path: Path) -> AsyncIterator[Deployment]:
    """A pipeline whose tables are made and granted, run by `as_user`."""
    made = Deployment(bootstrap_servers, database.url, tmp_path)
    await asyncio.to_thread(create_topics, made.settings.client_config(), made.topics)
    yield made
    made.close()
    await made.drop()


async def test_every_role_runs_as_a_user_with_its_rights_alone(database, deployment):
    def as_user(role: str) -> None:
        deployment.environment["DATABASE_URL"] = database.url_of(role)

    async def run(role: str, *command: str, code: int = 0) -> str:
        as_user(role)
        ended, out, err = await deployment.run(*command)
        assert (ended, "agent-metadata:" in err) == (code, False), err
        return out

    await database.grant("migrate")
    assert "applied 0001_metadata" in await run("migrate", "db", "migrate")
    await database.grant(*AFTER_MIGRATION)
    assert "MISSING" not in await run("status", "db", "status")

    as_user("serve")
    watching = deployment.start_command("watch")
    port = free_port()
    deployment.environment["AGENT_METADATA_SERVE_PORT"] = str(port)
    serving = deployment.start("serve")
    await deployment.ready(serving, port)
    await deployment.started("worker")
    as_user("sink")
    sink = await deployment.started("sink")
    now = datetime.now(UTC) - timedelta(minutes=1)
    with deployment.producer() as producer:
        producer.add(AGENT, ["cpu", "mem"], ["12%", "1 GB"], ["", ""], now)
    expected = {(str(AGENT), "cpu"): ("12%", "", now), (str(AGENT), "mem"): ("1 GB", "", now)}
    await deployment.wait_for(expected)
    with watching:
        assert json.loads(await asyncio.to_thread(watching.stdout.readline))["key"] == "cpu"
        watching.kill()
    await eventually("the row is served", lambda: "12%" in ask(port, f"/agents/{AGENT}/metadata")[1])
    assert "healthy" in await run("status", "status")
    assert "held" in await run("status", "why", str(AGENT), "cpu")
    assert "2" in await run("status", "replay", "--from", "1h ago", "--dry-run")

    await database.admin.execute("truncate workspace_agent_metadata")
    await deployment.wait_for(expected)  # the sink refills it
    await eventually("it is whole", lambda: is_whole(database.admin))
    assert deployment.stop(sink) == 0
    await database.admin.execute("truncate workspace_agent_metadata")
    await run("refill", "refill")
    await deployment.wait_for(expected)
    assert await is_whole(database.admin)
    await database.admin.execute("update workspace_agent_metadata set collected_at = '2001-01-01', value = 'old'")
    await run("refill", "replay", "--from", "1h ago")
    await deployment.wait_for(expected)


async def is_whole(admin: asyncpg.Connection) -> bool:
    epoch = await admin.fetchrow(statement("read_epoch"))
    return bool(epoch["filenode"] == epoch["whole_filenode"])
