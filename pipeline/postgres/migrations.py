"""Build the tables: sql/migrations in order, each once, whoever runs them and however often."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import structlog

from pipeline.data_files import data_dir
from pipeline.errors import ConfigError, SchemaMismatch
from pipeline.postgres.errors import translated_errors

# Any number will do, as long as no other program of the database takes the same.
_ADVISORY_LOCK: Final = 7_236_219_114
_MIGRATIONS_TABLE: Final = """
create table if not exists agent_metadata_migrations (
    version integer primary key,
    name text not null,
    checksum text not null,
    applied_at timestamptz not null default now()
)
"""
# What the statements of sql/ need.
_TABLES: Final = ("workspace_agent_metadata", "agent_metadata_progress", "agent_metadata_epoch")
# Coder's own table belongs to its agents; the one that our migration makes has no foreign key.
_PERSISTENCE: Final = """
select relpersistence = 'u' as is_unlogged,
    exists (select from pg_constraint where conrelid = pg_class.oid and contype = 'f') as is_coders
from pg_class
where oid = 'workspace_agent_metadata'::regclass
"""
# What a new row needs besides what the sink gives it; a domain may bring a default of its own.
_WITHOUT_DEFAULT: Final = """
select attname
from pg_attribute join pg_type on pg_type.oid = atttypid
where attrelid = 'workspace_agent_metadata'::regclass and attnum > 0 and not attisdropped
    and attnotnull and not atthasdef and attidentity = '' and typdefault is null
    and attname <> all(array['workspace_agent_id', 'key', 'value', 'error', 'collected_at'])
order by attnum
"""
_FILENODE: Final = "select pg_relation_filenode('workspace_agent_metadata')"
_SAME_EPOCH: Final = """
update agent_metadata_epoch set filenode = pg_relation_filenode('workspace_agent_metadata') where filenode = $1
"""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class MigrationStatus:
    """One migration; `changed` says that its file is not what was applied."""

    version: int
    name: str
    applied_at: datetime | None
    changed: bool


async def migrate(connection: Any, *, unlogged: bool = False) -> list[str]:
    """Apply what is missing, all in one transaction; return the names applied.

    `unlogged` makes workspace_agent_metadata UNLOGGED when it is not: writes cost less WAL, but a crash of Postgres
    empties the table, standbys never see it, and its definitions are gone with it. False makes it LOGGED again,
    except coder's own table, which is left as it is and logged about. Either change rewrites the table, and readers
    and writers wait for it.

    Guarantee: idempotent, all or nothing; of two runs at once the second waits for the first (an advisory lock of the
    database, held for the transaction: a session's would be left behind in a pool).

    Raises:
        SchemaMismatch: a migration that was applied has changed since, or its table is gone.
    """
    files = _migration_files()
    async with translated_errors("migrating"), connection.transaction():
        await connection.execute("select pg_advisory_xact_lock($1)", _ADVISORY_LOCK)
        await connection.execute(_MIGRATIONS_TABLE)
        status = await migration_status(connection)
        _refuse_changed(status)
        missing = [item for item in status if item.applied_at is None]
        for item in missing:
            await _apply(connection, item, files[item.version][1])
        await _refuse_gone(connection)
        await _set_persistence(connection, unlogged=unlogged)
    return [item.name for item in missing]


async def migration_status(connection: Any) -> list[MigrationStatus]:
    """List all migrations in order, applied or not."""
    async with translated_errors("reading migrations"):
        exists = await connection.fetchval("select to_regclass('agent_metadata_migrations') is not null")
        query = "select version, checksum, applied_at from agent_metadata_migrations"
        applied = {row["version"]: row for row in await connection.fetch(query)} if exists else {}
    status = []
    for version, (name, sql) in sorted(_migration_files().items()):
        row = applied.get(version)
        is_changed = row is not None and row["checksum"] != _checksum(sql)
        status.append(MigrationStatus(version, name, row["applied_at"] if row else None, is_changed))
    return status


async def require_schema(connection: Any) -> None:
    """Check that all migrations are applied, and that the tables they made are still there.

    Raises:
        SchemaMismatch: names what is missing or changed.
    """
    status = await migration_status(connection)
    _refuse_changed(status)
    if missing := [item.name for item in status if item.applied_at is None]:
        raise SchemaMismatch(f"the database lacks {', '.join(missing)}: run `agent-metadata db migrate`")
    async with translated_errors("looking for tables"):
        await _refuse_gone(connection)


async def require_defaults(connection: Any) -> None:
    """Check that a row can be made of a pair without a definition; coder's own table allows none.

    Raises:
        ConfigError: names the columns that would refuse it, each row anew.
    """
    async with translated_errors("looking for defaults"):
        lacking = [row["attname"] for row in await connection.fetch(_WITHOUT_DEFAULT)]
    if lacking:
        raise ConfigError(
            f"workspace_agent_metadata takes no new rows, for {', '.join(lacking)} can't be null and have no default: "
            "set AGENT_METADATA_UNDECLARED=ignore, or give them defaults"
        )


async def _apply(connection: Any, item: MigrationStatus, sql: str) -> None:
    await connection.execute(sql)
    await connection.execute(
        "insert into agent_metadata_migrations (version, name, checksum) values ($1, $2, $3)",
        item.version,
        item.name,
        _checksum(sql),
    )


async def _set_persistence(connection: Any, *, unlogged: bool) -> None:
    """Rewrite the table only if it is not as wanted, and coder's never to LOGGED: coder chose UNLOGGED for it."""
    table = await connection.fetchrow(_PERSISTENCE)
    if table["is_unlogged"] == unlogged:
        return
    if table["is_coders"] and not unlogged:
        _log.warning(
            "table_is_unlogged", table="workspace_agent_metadata", reason="coder made it so; a crash empties it"
        )
        return
    async with connection.transaction():
        before = await connection.fetchval(_FILENODE)
        await connection.execute(f"alter table workspace_agent_metadata set {'unlogged' if unlogged else 'logged'}")
        # Rewritten, and not emptied: no sink needs to refill it.
        await connection.execute(_SAME_EPOCH, before)


def _migration_files() -> dict[int, tuple[str, str]]:
    """Read (name, SQL) by version from files named NNNN_what_it_does.sql."""
    files = sorted((data_dir("sql") / "migrations").glob("*.sql"))
    return {int(file.name[:4]): (file.stem, file.read_text(encoding="utf-8")) for file in files}


def _checksum(sql: str) -> str:
    return hashlib.sha256(sql.encode()).hexdigest()


def _refuse_changed(status: list[MigrationStatus]) -> None:
    if changed := [item.name for item in status if item.changed]:
        raise SchemaMismatch(
            f"{', '.join(changed)} was applied with other contents: restore the file, and make a new migration instead"
        )


async def _refuse_gone(connection: Any) -> None:
    gone = await connection.fetch("select name from unnest($1::text[]) name where to_regclass(name) is null", _TABLES)
    if gone:
        raise SchemaMismatch(
            f"{', '.join(row['name'] for row in gone)} is gone though its migration was applied: restore it, or delete "
            f"the migration's row from agent_metadata_migrations and run `agent-metadata db migrate`"
        )
