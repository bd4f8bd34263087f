"""The commands `topics ...` and `db ...`: what must exist before a role can start."""

from __future__ import annotations

import msgspec
import typer

from pipeline.cli.console import CommandGroup, JsonOption, command_settings, run_job
from pipeline.errors import ExitCode
from pipeline.kafka.topics import create_topics, diff_topics
from pipeline.postgres.connections import connected
from pipeline.postgres.migrations import MigrationStatus, migrate, migration_status
from pipeline.settings import Settings

topics_app = CommandGroup(help="Create the Kafka topics that topics/*.toml declare, or compare the cluster with them.")
db_app = CommandGroup(help="Create or update the database's tables from sql/migrations, or see what is missing.")


@topics_app.command("create")
def topics_create() -> None:
    """Create the declared topics that the cluster lacks; existing topics are left alone."""
    settings = command_settings()
    created = create_topics(settings.client_config(), settings.declared_topics())
    print("\n".join(f"created {name}" for name in created) or "all topics exist")


@topics_app.command("diff")
def topics_diff(as_json: JsonOption = False) -> None:
    """Show where the cluster's topics differ from their declarations. Exit code 1 if any does."""
    settings = command_settings()
    differences = diff_topics(settings.client_config(), settings.declared_topics())
    if as_json:
        print(msgspec.json.encode(differences).decode())
    else:
        for item in differences:
            print(f"{item.topic}: {item.field} is {item.actual}, declared {item.declared}")
    if differences:
        raise typer.Exit(ExitCode.FAILURE)
    if not as_json:
        print("the cluster's topics are as declared")


@db_app.command("migrate")
def db_migrate() -> None:
    """Bring the database's tables up to date. Running it again is safe, even at the same time."""
    applied = run_job(_migrate(command_settings()))
    print("\n".join(f"applied {name}" for name in applied) or "the database is up to date")


async def _migrate(settings: Settings) -> list[str]:
    async with connected(settings.database_url.get_secret_value()) as connection:
        return await migrate(connection, unlogged=settings.unlogged)


@db_app.command("status")
def db_status(as_json: JsonOption = False) -> None:
    """Show which migrations are applied, and which are missing. Exit code 1 if any is missing or has changed."""
    migrations = run_job(_migration_status(command_settings()))
    if as_json:
        print(msgspec.json.encode(migrations).decode())
    else:
        for item in migrations:
            state = "changed since it was applied" if item.changed else (item.applied_at or "MISSING")
            print(f"{item.name}: {state}")
    if any(item.applied_at is None or item.changed for item in migrations):
        raise typer.Exit(ExitCode.FAILURE)


async def _migration_status(settings: Settings) -> list[MigrationStatus]:
    async with connected(settings.database_url.get_secret_value()) as connection:
        return await migration_status(connection)
