"""The command `agent-metadata`: options and output; what runs is wired in roles.py and demo.py."""

from __future__ import annotations

import json
import sys
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from pipeline.cli import dead_letter, replay, status
from pipeline.cli.console import EXIT_FAILURE, EXIT_USAGE, JsonOption, errors, printable
from pipeline.cli.console import command_settings as _settings
from pipeline.cli.console import run_job as _run
from pipeline.core.report import Report, canonical_agent_id, decode_report
from pipeline.errors import ConfigError, DecodeError, PipelineError
from pipeline.kafka.topics import create_topics, diff_topics, require_topics
from pipeline.listener import Change
from pipeline.local.demo import DemoOptions, run_demo
from pipeline.local.services import ServicesKind
from pipeline.local.simulate import reports, send_at_pace
from pipeline.monitoring.logs import configure_logging
from pipeline.postgres.connections import connected, listener, require_sessions
from pipeline.postgres.migrations import migrate, migration_status
from pipeline.producer import MetadataProducer
from pipeline.roles.serve import run_serve
from pipeline.roles.sink import run_sink
from pipeline.roles.supervisor import Supervisor
from pipeline.roles.worker import run_worker
from pipeline.settings import Settings, describe_settings

app = typer.Typer(
    help="Carries live agent metadata from Kafka to Postgres and on to listeners. Settings come from the environment: "
    "KAFKA_BOOTSTRAP_SERVERS, DATABASE_URL and AGENT_METADATA_*; see README.md.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
topics_app = typer.Typer(help="The Kafka topics, as topics/*.toml declares them.", no_args_is_help=True)
db_app = typer.Typer(help="The database's tables, as sql/migrations builds them.", no_args_is_help=True)
app.add_typer(topics_app, name="topics")
app.add_typer(db_app, name="db")
app.add_typer(dead_letter.app, name="dead-letter")
app.add_typer(replay.app)
app.add_typer(status.app)


def main() -> None:
    """Run the command line; what a user can cause ends in one line on stderr and exit code 1 or 2."""
    try:
        app()
    except ConfigError as error:
        errors.print(f"agent-metadata: {error}", markup=False)
        sys.exit(EXIT_USAGE)
    except PipelineError as error:
        errors.print(f"agent-metadata: {error}", markup=False)
        sys.exit(EXIT_FAILURE)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def worker() -> None:
    """Fold reports into windows and publish each closed window as batches. Stops cleanly on SIGTERM."""
    _run(run_worker(_settings()))


@app.command()
def sink() -> None:
    """Apply batches to Postgres: rows, progress and NOTIFY in one transaction. Stops cleanly on SIGTERM."""
    _run(run_sink(_settings()))


@app.command()
def run() -> None:
    """Run a worker and a sink as two processes, restarting either: all that a small set-up deploys.

    The sink's metrics are served one port above the worker's (AGENT_METADATA_METRICS_PORT).
    """
    settings = _settings()
    port = settings.metrics_port
    environments = {
        "worker": {"AGENT_METADATA_METRICS_PORT": str(port)},
        "sink": {"AGENT_METADATA_METRICS_PORT": str(port + 1 if port else 0)},
    }

    async def supervise() -> int:
        return await Supervisor(environments).run()

    sys.exit(_run(supervise()))


@app.command()
def serve() -> None:
    """Serve the live page, the HTTP API and event streams. Stops cleanly on SIGTERM."""
    _run(run_serve(_settings()))


@app.command()
def watch(
    agent_ids: Annotated[list[str] | None, typer.Argument(help="Agents to watch; all if none is given.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows as they change: a live table on a terminal, or one JSON line a change. Ctrl-C ends it."""
    settings = _settings()
    try:
        watched = [uuid.UUID(canonical_agent_id(text)) for text in agent_ids] if agent_ids else None
    except DecodeError as error:
        raise ConfigError(str(error)) from None
    show = _print_change if as_json or not sys.stdout.isatty() else _LiveTable().show
    try:
        _run(_watch(settings, watched, show))
    except BrokenPipeError:
        sys.stderr.close()  # the reader has gone; Python would complain about its own flush


async def _watch(settings: Settings, watched: list[uuid.UUID] | None, show: Callable[[Change], None]) -> None:
    await require_sessions(settings)  # what is wrong is an error now, and an outage to wait out later
    async for change in listener(settings, watched).changes():
        show(change)


def _print_change(change: Change) -> None:
    line = {
        "agent_id": str(change.agent_id),
        "key": change.key,
        "value": change.value,
        "error": change.error,
        "collected_at": change.collected_at.isoformat(),
        "notified_at": change.notified_at,
    }
    print(json.dumps(line), flush=True)  # the command's output


class _LiveTable:
    """The rows that changed last, redrawn a few times a second."""

    _ROWS = 40

    def __init__(self) -> None:
        from rich.live import Live

        self._changes: dict[tuple[uuid.UUID, str], Change] = {}
        self._live = Live(get_renderable=self._draw, refresh_per_second=4, screen=False)
        self._live.start()

    def show(self, change: Change) -> None:
        pair = (change.agent_id, change.key)
        self._changes.pop(pair, None)
        self._changes[pair] = change
        while len(self._changes) > self._ROWS:
            self._changes.pop(next(iter(self._changes)))

    def _draw(self) -> Table:
        table = Table("agent", "key", "value", "error", "age", title="agent metadata, latest changes last")
        now = datetime.now().astimezone()
        for change in self._changes.values():
            age = f"{max(0.0, (now - change.collected_at).total_seconds()):.0f} s"
            texts = (str(change.agent_id), change.key, change.value, change.error, age)
            table.add_row(*(_plain(text) for text in texts))
        return table


def _plain(text: str) -> str:
    """Make a value harmless in a table: no control characters, no markup, one line."""
    from rich.markup import escape

    return escape(printable(text, limit=120))


@app.command()
def produce(
    agents: Annotated[
        int | None, typer.Option(min=1, help="Simulate this many agents instead of reading stdin.")
    ] = None,
    keys: Annotated[int, typer.Option(min=1, max=200, help="Keys of each simulated agent.")] = 10,
    interval: Annotated[float, typer.Option(min=0.01, help="Seconds between two reports of one agent.")] = 1.0,
    duration: Annotated[float, typer.Option(min=0.01, help="Seconds to simulate.")] = 30.0,
    oracle: Annotated[
        Path | None, typer.Option(help="Write here what the table must hold in the end, a JSON line a pair.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Produce reports: from stdin, one JSON report a line, or of simulated agents.

    A line: {"agent_id": UUID, "entries": [{"key": "cpu", "value": "12%"}], "collected_at": RFC 3339, optional}
    """
    settings = _settings()
    events = settings.declared_topics()["events"]
    _run(require_topics(settings.client_config(), {"events": events}))
    with MetadataProducer(settings.client_config(), topic=settings.events_topic) as producer:
        if agents is None:
            counts = _produce_lines(producer)
        else:
            simulated = reports(agents=agents, keys=keys, interval_seconds=interval, duration_seconds=duration)
            counts = _simulate(producer, simulated, oracle)
        counts["not_acknowledged"] = producer.close()
    print(json.dumps(counts) if as_json else ", ".join(f"{n} {name}" for name, n in counts.items()))
    if counts["not_acknowledged"] or counts.get("dropped") or counts.get("refused"):
        raise PipelineError("some reports were not accepted: see above")


def _simulate(producer: MetadataProducer, simulated: Any, oracle_file: Path | None) -> dict[str, int]:
    stopped: list[bool] = []
    import signal

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.append(True))
    oracle = send_at_pace(simulated, producer, is_stopped=lambda: bool(stopped))
    if oracle_file is not None:
        oracle.write(oracle_file)
    return {"reports": oracle.reports, "entries": oracle.entries, "dropped": oracle.dropped}


def _produce_lines(producer: MetadataProducer) -> dict[str, int]:
    counts = {"reports": 0, "entries": 0, "empty": 0, "dropped": 0, "refused": 0}
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if not line.strip():
            continue
        try:
            report, left_out = decode_report(line)
            is_queued = _add(producer, report)
            if left_out is not None:
                raise ValueError(left_out)
        except (DecodeError, ValueError) as error:
            counts["refused"] += 1
            errors.print(f"line {number}: {error}", markup=False)
            continue
        if not report.entries:
            counts["empty"] += 1  # sends nothing: not an error, as in coder's agent API
            continue
        counts["reports" if is_queued else "dropped"] += 1
        counts["entries"] += len(report.entries) if is_queued else 0
    return counts


def _add(producer: MetadataProducer, report: Report) -> bool:
    entries = report.entries
    times: Any = report.collected_at
    if any(entry.collected_at is not None for entry in entries):
        now = datetime.now().astimezone()
        times = [entry.collected_at or report.collected_at or now for entry in entries]
    return producer.add(
        uuid.UUID(canonical_agent_id(report.agent_id)),
        [entry.key for entry in entries],
        [entry.value for entry in entries],
        [entry.error for entry in entries],
        times,
    )


@app.command()
def demo(
    agents: Annotated[int, typer.Option(min=1, help="Simulated agents.")] = 200,
    keys: Annotated[int, typer.Option(min=1, max=200, help="Keys of each agent.")] = 10,
    interval: Annotated[float, typer.Option(min=0.01, help="Seconds between two reports of one agent.")] = 1.0,
    window: Annotated[float, typer.Option(min=0.1, max=3600, help="Seconds a window lasts.")] = 5.0,
    duration: Annotated[
        float | None, typer.Option(min=1, help="Seconds to simulate.", show_default="30; 600 with --serve")
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the live page meanwhile; its port is AGENT_METADATA_SERVE_PORT.")
    ] = False,
    services: Annotated[
        ServicesKind | None,
        typer.Option(help="Force where Kafka and Postgres come from: env, docker, packages, embedded."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run everything once on this machine and compare the table with what was produced.

    Brings up Kafka and Postgres (unless KAFKA_BOOTSTRAP_SERVERS and DATABASE_URL name some), simulated agents,
    worker, sink and listener. Exits with 1 unless every row is right.
    """
    configure_logging("console")
    seconds = duration or (600.0 if serve else 30.0)
    options = DemoOptions(agents, keys, interval, window, seconds, services, serve)
    summary = run_demo(options, console=errors)
    if as_json:
        print(json.dumps(summary))
    else:
        table = Table("demo", "", show_header=False)
        for name, value in summary.items():
            table.add_row(name, json.dumps(value) if isinstance(value, dict) else str(value))
        Console().print(table)
    if summary["mismatched_rows"]:
        raise PipelineError(f"{summary['mismatched_rows']} rows differ from what was produced")


@app.command()
def config(as_json: JsonOption = False) -> None:
    """Print the settings in force and where each comes from: environment, file or default. Secrets are masked."""
    described = describe_settings(_settings())
    if as_json:
        print(json.dumps({variable: {"value": value, "origin": origin} for variable, value, origin in described}))
        return
    width = max(len(variable) for variable, _, _ in described)
    for variable, value, origin in described:
        print(f"{variable:{width}}  {value}  ({origin})")


@topics_app.command("create")
def topics_create() -> None:
    """Create the declared topics that the cluster lacks; those it has are left alone."""
    settings = _settings()
    created = create_topics(settings.client_config(), settings.declared_topics())
    print("\n".join(f"created {name}" for name in created) or "all topics exist")


@topics_app.command("diff")
def topics_diff(as_json: JsonOption = False) -> None:
    """Show where the cluster's topics differ from their declarations; exit 1 if they do anywhere."""
    settings = _settings()
    differences = diff_topics(settings.client_config(), settings.declared_topics())
    if as_json:
        print(msgspec.json.encode(differences).decode())
    for item in () if as_json else differences:
        print(f"{item.topic}: {item.field} is {item.actual}, declared {item.declared}")
    if differences:
        raise typer.Exit(EXIT_FAILURE)
    if not as_json:
        print("the cluster's topics are as declared")


@db_app.command("migrate")
def db_migrate() -> None:
    """Bring the database's tables up to date; safe to run twice, and twice at once."""
    settings = _settings()

    async def job() -> list[str]:
        async with connected(settings) as connection:
            return await migrate(connection, unlogged=settings.unlogged)

    applied = _run(job())
    print("\n".join(f"applied {name}" for name in applied) or "the database is up to date")


@db_app.command("status")
def db_status(as_json: JsonOption = False) -> None:
    """Show which migrations are applied and which are missing; exit 1 if any is."""
    settings = _settings()

    async def job() -> Any:
        async with connected(settings) as connection:
            return await migration_status(connection)

    found = _run(job())
    if as_json:
        print(msgspec.json.encode(found).decode())
    for item in () if as_json else found:
        state = "changed since it was applied" if item.changed else (item.applied_at or "MISSING")
        print(f"{item.name}: {state}")
    if any(item.applied_at is None or item.changed for item in found):
        raise typer.Exit(EXIT_FAILURE)
