"""The commands `status`, `why` and `shadow`: their options and output."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Final

import msgspec
import typer
from rich.console import Console
from rich.progress import Progress, TextColumn
from rich.table import Table

from pipeline.cli.console import (
    CommandGroup,
    JsonOption,
    command_settings,
    identified,
    print_json,
    run_job,
    shown,
    stderr,
)
from pipeline.core.printable import printable
from pipeline.errors import ConfigError, ExitCode
from pipeline.jobs.shadow import ShadowDiff, shadow_diff
from pipeline.jobs.status import SERVICES, Status, gather_status
from pipeline.jobs.trace import trace
from pipeline.jobs.why import Trace, explain
from pipeline.postgres.connections import connected
from pipeline.postgres.migrations import require_schema
from pipeline.postgres.names import read_name
from pipeline.settings import Settings

_MOST_CHARACTERS: Final = 60

app = CommandGroup()
shadow_app = CommandGroup(
    help="Compare a second table, written alongside the one that coder's own batcher writes, before switching over."
)
app.add_typer(shadow_app, name="shadow")


@app.command()
def status(
    max_lag: Annotated[
        float,
        typer.Option(
            metavar="SECONDS", min=0, help="How far the sink may be behind, and the worker in addition to its window."
        ),
    ] = 30.0,
    stale_after: Annotated[
        float, typer.Option(metavar="SECONDS", min=0, help="An agent without a newer value for this long is stale.")
    ] = 3600.0,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL",
            help="Where a role serves /metrics; repeat it for more.",
            show_default="those of `run` on this machine, by AGENT_METADATA_METRICS_PORT",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show lags, batches, dead letters and the table on one screen. Exit code 1 unless everything is healthy."""
    settings = command_settings()
    if bad := [url for url in metrics or () if not url.startswith(("http://", "https://"))]:
        raise ConfigError(f"--metrics {bad[0]!r} is not a URL: write http://host:port/metrics")
    found, problems = run_job(_status(settings, max_lag, stale_after, metrics or _own_metrics(settings)))
    if as_json:
        print_json({"healthy": not problems, "problems": problems, **msgspec.structs.asdict(found)})
    else:
        _show_status(found, problems, stale_after)
    if problems:
        raise typer.Exit(ExitCode.FAILURE)


async def _status(
    settings: Settings, max_lag: float, stale_after: float, metrics: list[str]
) -> tuple[Status, list[str]]:
    async with connected(settings.database_url.get_secret_value()) as connection:
        await require_schema(connection)
        found = await gather_status(settings, connection, stale_after_seconds=stale_after, metrics_urls=metrics)
    return found, found.problems(worker_may_lag_seconds=settings.window_seconds + max_lag, sink_may_lag_seconds=max_lag)


def _own_metrics(settings: Settings) -> list[str]:
    """Return where `run` serves metrics on this machine: the worker's at the port, the sink's one above."""
    port = settings.metrics_port
    return [f"http://localhost:{number}/metrics" for number in (port, port + 1)] if port else []


def _show_status(found: Status, problems: list[str], stale_after: float) -> None:
    table = Table("partition", "worker lag", "waited", "open pairs", "sink lag", "waited", "last batch applied")
    for item in found.partitions:
        table.add_row(
            str(item.partition),
            f"{item.worker_lag:,}",
            f"{item.worker_behind_seconds:.1f} s",
            "?" if item.open_pairs is None else f"{item.open_pairs:,}",
            f"{item.sink_lag:,}",
            f"{item.sink_behind_seconds:.1f} s",
            _ago(item.last_applied_at),
        )
    console = Console(highlight=False)
    console.print(table)
    held = found.table
    rows = (
        f"{held.rows:,} rows of {held.agents:,} agents; {held.stale_agents:,} stale (nothing for {stale_after:g} s)"
        if held
        else "not counted in time"
    )
    outages = found.outage_seconds
    outage = ", ".join(f"{SERVICES.get(name, name)} {seconds:.0f} s" for name, seconds in (outages or {}).items())
    uncommitted = sum(item.uncommitted for item in found.partitions)
    open_for = max((item.uncommitted_seconds for item in found.partitions), default=0.0)
    transactions = f"{uncommitted:,} records wait, open for {open_for:.0f} s" if uncommitted else "none open"
    for name, text in (
        ("workers, sinks", f"{found.workers}, {found.sinks}"),
        ("transactions", transactions),
        ("outage", "?" if outages is None else outage or "none"),
        ("dead letters", f"{found.dead_letters:,}"),
        ("table", rows),
    ):
        console.print(f"{name:15} {text}", markup=False)
    for agent in held.latest_stale if held else ():
        console.print(shown(f"{'  fell silent':15} {agent.name or agent.agent_id}", _MOST_CHARACTERS), end=", ")
        console.print(_ago(agent.newest), markup=False)
    if outages is None:
        console.print(
            "? = no role's /metrics answers; say where they are: --metrics http://host:port/metrics", markup=False
        )
    for risk in found.risks:
        if not risk.is_problem:
            console.print(f"note: {risk.text}", markup=False)
    for problem in problems:
        console.print(shown(f"UNHEALTHY: {problem}"))
    if not problems:
        console.print("healthy", markup=False)


def _ago(moment: datetime | None) -> str:
    return "never" if moment is None else f"{(datetime.now(UTC) - moment).total_seconds():.1f} s ago"


@app.command()
def why(
    agent_id: Annotated[str, typer.Argument(metavar="AGENT", help="The agent's UUID or name.")],
    key: Annotated[str, typer.Argument(metavar="KEY", help="The metadata key.")],
    as_json: JsonOption = False,
) -> None:
    """Trace one pair: its newest event, the batch that carried it, its row, and what is missing between them.

    Exit code 1 unless the row is as new as the newest event.
    """
    settings = command_settings()
    found = run_job(_trace(settings, *identified(agent_id, name="AGENT"), key))
    verdict, explanation = explain(found)
    if as_json:
        print_json({"verdict": verdict, "explanation": explanation, **msgspec.structs.asdict(found)})
    else:
        _show_trace(settings, found, verdict, explanation)
    if verdict not in ("held", "row_newer"):
        raise typer.Exit(ExitCode.FAILURE)


async def _trace(settings: Settings, agent_id: str, name: str | None, key: str) -> Trace:
    async with connected(settings.database_url.get_secret_value()) as connection:
        await require_schema(connection)
        name = name or await read_name(connection, agent_id)
        columns = (TextColumn("searching: {task.completed:,.0f} records, {task.speed:,.0f}/s"),)
        with Progress(*columns, console=stderr, disable=not stderr.is_terminal, transient=True) as bar:
            task = bar.add_task("", total=None)
            return await trace(
                settings, connection, agent_id, key, name=name, on_searched=lambda records: bar.advance(task, records)
            )


def _show_trace(settings: Settings, found: Trace, verdict: str, explanation: str) -> None:
    event, batch, row = found.event, found.batch, found.row
    lines = {"agent": found.name, "id": found.agent_id} if found.name else {"agent": found.agent_id}
    lines |= {"event": "none in the topic", "batch": "none", "row": "none"}
    if event is not None:
        shown = f"refused: {event.refused}" if event.refused else _entry(event.value, event.error, event.collected_at)
        arrived = f"appended {event.appended_at:%Y-%m-%dT%H:%M:%S.%fZ}"
        lines["event"] = f"{settings.events_topic} {event.partition}@{event.offset}, {arrived}, {shown}"
    if batch is not None:
        closed = f"{batch.reason} close at {batch.closed_at:%Y-%m-%dT%H:%M:%S.%fZ}"
        where = f"{settings.batches_topic} {batch.partition}@{batch.offset}"
        lines["batch"] = f"{where}, part {batch.part} of {batch.parts}, {closed}"
    if row is not None:
        lines["row"] = _entry(row.value, row.error, row.collected_at)
    for name, text in (*lines.items(), (verdict, explanation)):
        print(printable(f"{name + ':':12} {text}"))


def _entry(value: str, error: str, collected_at: datetime | None) -> str:
    """Show a value on one line, in quotes; repr() escapes what printable() escapes."""
    of = f" of {collected_at.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%fZ}" if collected_at else ""
    return f"{value[:80]!r}{f' (error {error[:80]!r})' if error else ''}{of}"


@shadow_app.command("diff")
def shadow_diff_command(
    live: Annotated[str, typer.Option(metavar="SCHEMA", help="Schema of the table that coder writes.")] = "public",
    settle: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Count pairs that differ separately if they changed less than this long ago.",
        ),
    ] = 30.0,
    as_json: JsonOption = False,
) -> None:
    """Compare the table in DATABASE_URL's search_path with the live one. Exit code 1 if values differ or are missing.

    Times are not compared, because coder stamps a report when its server receives it.
    """
    settings = command_settings()

    async def job() -> ShadowDiff:
        async with connected(settings.database_url.get_secret_value()) as connection:
            return await shadow_diff(connection, live_schema=live, settle_seconds=settle)

    found = run_job(job())
    if as_json:
        print_json(found)
    else:
        for label, count in (
            ("the same", found.same),
            ("different", found.different),
            ("only in the live table", found.only_live),
            ("only in the shadow", found.only_shadow),
            (f"different, changed in the last {settle:g} s", found.unsettled),
        ):
            print(f"{label:40} {count:>12,}")
        for pair in found.pairs:
            sides = (f"{side} {(pair[f'{side}_value'] or '')[:60]!r}" for side in ("live", "shadow"))
            print(f"{pair['agent_id']} {pair['key']!r}: {', '.join(sides)}")
    if found.different or found.only_live:
        raise typer.Exit(ExitCode.FAILURE)
