"""Build the tables: the files of sql/migrations, in order and each once, even if several processes run them at once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime
from typing import Final

import structlog

from pipeline.data_files import data_dir
from pipeline.errors import ConfigError, SchemaMismatch
from pipeline.postgres.connections import Connection
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.statements import fetch_one, statement

# Any number will do, as long as no other program of the database takes the same.
_ADVISORY_LOCK: Final = 7_236_219_114
# What the statements of sql/ use.
_TABLES: Final = (
    "workspace_agent_metadata",
    "agent_metadata_progress",
    "agent_metadata_epoch",
    "agent_metadata_names",
)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class MigrationStatus:
    """One migration; `changed` says that its file is no longer what was applied."""

    version: int
    name: str
    applied_at: datetime | None
    changed: bool


async def migrate(connection: Connection, *, unlogged: bool = False) -> list[str]:
    """Apply the missing migrations, all in one transaction; return their names.

    `unlogged` makes workspace_agent_metadata UNLOGGED: writes cost less WAL, but a crash of Postgres empties the table,
    definitions included, and standbys never see it. False makes it LOGGED again, except coder's own table, which stays
    as it is, with a warning. Either change rewrites the table, and readers and writers wait for it.

    Guarantee: idempotent, all or nothing; of two runs at once the second waits for the first (an advisory lock held
    for the transaction: one held for the session would be left behind in a pooler).

    Raises:
        SchemaMismatch: a migration changed after being applied, or its table is gone.
    """
    files = _migration_files()
    async with translated_errors("migrating"), connection.transaction():
        await connection.execute("select pg_advisory_xact_lock($1)", _ADVISORY_LOCK)
        await connection.execute(statement("create_migrations"))
        status = await migration_status(connection)
        _refuse_changed(status)
        missing = [item for item in status if item.applied_at is None]
        for item in missing:
            await _apply(connection, item, files[item.version][1])
        await _refuse_missing_tables(connection)
        await _set_persistence(connection, unlogged=unlogged)
    return [item.name for item in missing]


async def migration_status(connection: Connection) -> list[MigrationStatus]:
    """List all migrations in order, applied or not."""
    async with translated_errors("reading migrations"):
        exists = await connection.fetchval(statement("find_migrations"))
        rows = await connection.fetch(statement("read_migrations")) if exists else []
    applied = {row["version"]: row for row in rows}
    status = []
    for version, (name, sql) in sorted(_migration_files().items()):
        row = applied.get(version)
        is_changed = row is not None and row["checksum"] != _checksum(sql)
        status.append(MigrationStatus(version, name, row["applied_at"] if row else None, is_changed))
    return status


async def require_schema(connection: Connection) -> None:
    """Check that all migrations are applied, and that the tables they made are still there.

    Raises:
        SchemaMismatch: names what is missing or changed.
    """
    status = await migration_status(connection)
    _refuse_changed(status)
    if missing := [item.name for item in status if item.applied_at is None]:
        raise SchemaMismatch(f"the database lacks {', '.join(missing)}: run `agent-metadata db migrate`")
    async with translated_errors("looking for tables"):
        await _refuse_missing_tables(connection)


async def require_defaults(connection: Connection) -> None:
    """Check that a pair without a definition can get a row; coder's own table does not allow it.

    Raises:
        ConfigError: names the columns that would have every such row refused.
    """
    async with translated_errors("looking for defaults"):
        columns = [row["attname"] for row in await connection.fetch(statement("required_columns"))]
    if columns:
        raise ConfigError(
            f"workspace_agent_metadata takes no new rows: {', '.join(columns)} can't be null and have no default; "
            "set AGENT_METADATA_UNDECLARED=ignore, or give them defaults"
        )


async def _apply(connection: Connection, migration: MigrationStatus, sql: str) -> None:
    await connection.execute(sql)
    await connection.execute(statement("save_migration"), migration.version, migration.name, _checksum(sql))


async def _set_persistence(connection: Connection, *, unlogged: bool) -> None:
    """Rewrite the table only where its persistence differs, and never coder's to LOGGED: coder chose UNLOGGED."""
    table = await fetch_one(connection, statement("read_persistence"))
    if table["is_unlogged"] == unlogged:
        return
    if table["is_coders"] and not unlogged:
        _log.warning(
            "table_is_unlogged", table="workspace_agent_metadata", reason="coder made it that way; a crash empties it"
        )
        return
    async with connection.transaction():
        filenode = await connection.fetchval(statement("read_filenode"))
        await connection.execute(statement("set_unlogged" if unlogged else "set_logged"))
        # Rewritten but not emptied, so no sink needs to refill it.
        await connection.execute(statement("move_epoch"), filenode)


def _migration_files() -> dict[int, tuple[str, str]]:
    """Read (name, SQL) by version from files named NNNN_what_it_does.sql."""
    files = sorted((data_dir("sql") / "migrations").glob("*.sql"))
    return {int(file.name[:4]): (file.stem, file.read_text(encoding="utf-8")) for file in files}


def _checksum(sql: str) -> str:
    return hashlib.sha256(sql.encode()).hexdigest()


def _refuse_changed(status: list[MigrationStatus]) -> None:
    if names := [item.name for item in status if item.changed]:
        raise SchemaMismatch(
            f"{', '.join(names)} changed after being applied: restore the file, and write a new migration instead"
        )


async def _refuse_missing_tables(connection: Connection) -> None:
    missing = await connection.fetch(statement("missing_tables"), _TABLES)
    if missing:
        names = ", ".join(row["name"] for row in missing)
        raise SchemaMismatch(
            f"{names} is gone though its migration was applied: restore it, or delete the migration's row from "
            "agent_metadata_migrations and run `agent-metadata db migrate`"
        )
