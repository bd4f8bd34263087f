"""The command `agent-metadata`: options and output; what runs is wired in roles.py and demo.py."""

from __future__ import annotations

import contextlib
import json
import sys
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from pipeline import topic_admin
from pipeline.dead_letter import DeadLetter, when
from pipeline.demo import DemoOptions, run_demo
from pipeline.errors import ConfigError, DecodeError, PipelineError
from pipeline.listener import Change
from pipeline.logs import configure_logging
from pipeline.migrations import migrate, migration_status
from pipeline.producer import MetadataProducer
from pipeline.redrive import Filter, dead_letters, redrive
from pipeline.report import Report, canonical_agent_id, decode_report
from pipeline.roles import connected, listener, run_sink, run_worker
from pipeline.settings import Settings, describe_settings, load_settings
from pipeline.simulate import Oracle, reports, send_at_pace
from pipeline.supervise import Supervisor

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2

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
dead_letter_app = typer.Typer(help="What could not be used: look at it, and give it another try.", no_args_is_help=True)
app.add_typer(db_app, name="db")
app.add_typer(dead_letter_app, name="dead-letter")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
errors = Console(stderr=True, soft_wrap=True, highlight=False)


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


def _settings(**overrides: Any) -> Settings:
    settings = load_settings(**overrides)
    configure_logging(settings.log_format)
    return settings


def _run(job: Awaitable[Any]) -> Any:
    async def wrapped() -> Any:
        return await job

    return uvloop.run(wrapped())


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
    async with connected(settings):
        pass  # a wrong address or password is an error now, and an outage to wait out later
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
    print(json.dumps(line), flush=True)  # noqa: T201  # the command's output


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

    return escape(_printable(text, limit=120))


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
    topic_admin.require_topics(
        settings.client_config(),
        topic_admin.load_topic_specs(names=settings.topic_names, partitions=settings.partitions),
        timeout_s=10.0,
    )
    with MetadataProducer(settings.client_config(), topic=settings.events_topic) as producer:
        if agents is None:
            counts = _produce_lines(producer)
        else:
            simulated = reports(agents=agents, keys=keys, interval_seconds=interval, duration_seconds=duration)
            counts = _simulate(producer, simulated, oracle)
        counts["not_acknowledged"] = producer.close()
    print(json.dumps(counts) if as_json else ", ".join(f"{n} {name}" for name, n in counts.items()))  # noqa: T201
    if counts["not_acknowledged"] or counts.get("dropped") or counts.get("refused"):
        raise PipelineError("some reports were not accepted: see above")


def _simulate(producer: MetadataProducer, simulated: Any, oracle_file: Path | None) -> dict[str, int]:
    stopped: list[bool] = []
    import signal

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.append(True))
    oracle: Oracle = send_at_pace(simulated, producer.add, on_report=lambda _: None, stop=lambda: bool(stopped))
    if oracle_file is not None:
        oracle.write(oracle_file)
    return {"reports": oracle.reports, "entries": oracle.entries, "dropped": oracle.dropped}


def _produce_lines(producer: MetadataProducer) -> dict[str, int]:
    counts = {"reports": 0, "entries": 0, "dropped": 0, "refused": 0}
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if not line.strip():
            continue
        try:
            report, _ = decode_report(line)
            is_queued = _add(producer, report)
        except (DecodeError, ValueError) as error:
            counts["refused"] += 1
            errors.print(f"line {number}: {error}", markup=False)
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
    duration: Annotated[float, typer.Option(min=1, help="Seconds to simulate.")] = 30.0,
    services: Annotated[
        str | None, typer.Option(help="Force where Kafka and Postgres come from: env, docker, packages, embedded.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run everything once on this machine and compare the table with what was produced.

    Brings up Kafka and Postgres (unless KAFKA_BOOTSTRAP_SERVERS and DATABASE_URL name some), simulated agents,
    worker, sink and listener. Exits with 1 unless every row is right.
    """
    configure_logging("console")
    options = DemoOptions(agents, keys, interval, window, duration, services)
    summary = run_demo(options, console=errors)
    if as_json:
        print(json.dumps(summary))  # noqa: T201
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
        print(json.dumps({variable: {"value": value, "origin": origin} for variable, value, origin in described}))  # noqa: T201
        return
    width = max(len(variable) for variable, _, _ in described)
    for variable, value, origin in described:
        print(f"{variable:{width}}  {value}  ({origin})")  # noqa: T201


@topics_app.command("create")
def topics_create() -> None:
    """Create the declared topics that the cluster lacks; those it has are left alone."""
    settings = _settings()
    specs = topic_admin.load_topic_specs(names=settings.topic_names, partitions=settings.partitions)
    created = topic_admin.create_topics(settings.client_config(), specs)
    print("\n".join(f"created {name}" for name in created) or "all topics exist")  # noqa: T201


@topics_app.command("diff")
def topics_diff(as_json: JsonOption = False) -> None:
    """Show where the cluster's topics differ from their declarations; exit 1 if they do anywhere."""
    settings = _settings()
    specs = topic_admin.load_topic_specs(names=settings.topic_names, partitions=settings.partitions)
    differences = topic_admin.diff_topics(settings.client_config(), specs)
    if as_json:
        print(msgspec.json.encode(differences).decode())  # noqa: T201
    for item in () if as_json else differences:
        print(f"{item.topic}: {item.field} is {item.actual}, declared {item.declared}")  # noqa: T201
    if differences:
        raise typer.Exit(EXIT_FAILURE)
    if not as_json:
        print("the cluster's topics are as declared")  # noqa: T201


@db_app.command("migrate")
def db_migrate() -> None:
    """Bring the database's tables up to date; safe to run twice, and twice at once."""
    settings = _settings()

    async def job() -> list[str]:
        async with connected(settings) as connection:
            return await migrate(connection, unlogged=settings.unlogged)

    applied = _run(job())
    print("\n".join(f"applied {name}" for name in applied) or "the database is up to date")  # noqa: T201


@db_app.command("status")
def db_status(as_json: JsonOption = False) -> None:
    """Show which migrations are applied and which are missing; exit 1 if any is."""
    settings = _settings()

    async def job() -> Any:
        async with connected(settings) as connection:
            return await migration_status(connection)

    status = _run(job())
    if as_json:
        print(msgspec.json.encode(status).decode())  # noqa: T201
    for item in () if as_json else status:
        state = "changed since it was applied" if item.changed else (item.applied_at or "MISSING")
        print(f"{item.name}: {state}")  # noqa: T201
    if any(item.applied_at is None or item.changed for item in status):
        raise typer.Exit(EXIT_FAILURE)


AgentOption = Annotated[str | None, typer.Option("--agent", help="Only this agent's (by the record key).")]
StageOption = Annotated[str | None, typer.Option("--stage", help="Only what this refused: worker or sink.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Only where the reason holds this text.")]


@dead_letter_app.command("list")
def dead_letter_list(
    agent: AgentOption = None,
    stage: StageOption = None,
    reason: ReasonOption = None,
    limit: Annotated[int, typer.Option(min=1, help="Show the last so many.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List what the dead-letter topic holds, the oldest first. With --json one line each, and no limit."""
    settings, chosen = _settings(), _filter(agent, stage, reason)
    shown: deque[DeadLetter] = deque(maxlen=limit)
    count = 0
    with _progress("reading") as on_progress:
        for letter in dead_letters(settings, chosen, on_progress=on_progress):
            count += 1
            if as_json:
                print(json.dumps(_letter_json(letter)))  # noqa: T201
            else:
                shown.append(letter)
    if as_json:
        return
    for letter in shown:
        place = f"{letter.partition}:{letter.offset}"
        text = f"{place}  {when(letter.timestamp_ms)}  {letter.stage}  {letter.agent or '-'}  {letter.reason}"
        print(_printable(text, limit=300))  # noqa: T201
    print(f"{count} dead letters" + (f", the last {limit} shown" if count > limit else ""))  # noqa: T201


@dead_letter_app.command("show")
def dead_letter_show(
    offset: Annotated[str, typer.Argument(help="Which, as `list` shows it: PARTITION:OFFSET, or OFFSET for 0:OFFSET.")],
    as_json: JsonOption = False,
) -> None:
    """Show one dead letter whole: where it was, why it was refused, its headers and its value."""
    settings, place = _settings(), _offset(offset)
    letter = next(dead_letters(settings, Filter(offset=place)), None)
    if letter is None:
        raise PipelineError(f"{settings.dead_letter_topic} holds nothing at {place[0]}:{place[1]}; see `list`")
    if as_json:
        print(json.dumps(_letter_json(letter)))  # noqa: T201
        return
    lines = {
        "was": letter.source,
        "appended": when(letter.timestamp_ms),
        "dead-lettered": when(letter.appended_ms),
        "by": letter.stage,
        "reason": letter.reason,
        "redriven": f"{letter.redrives} times",
        "key": letter.agent,
        "headers": ", ".join(f"{name}={value!r}" for name, value in letter.original) or "none",
        "value": "none (a tombstone)" if letter.value is None else letter.value.decode(errors="backslashreplace"),
    }
    for name, text in lines.items():
        print(f"{name + ':':15}{_printable(text)}")  # noqa: T201


@dead_letter_app.command("redrive")
def dead_letter_redrive(
    agent: AgentOption = None,
    stage: StageOption = None,
    reason: ReasonOption = None,
    offset: Annotated[str | None, typer.Option(help="Only this one: PARTITION:OFFSET, or OFFSET for 0:OFFSET.")] = None,
    all_of_them: Annotated[
        bool, typer.Option("--all", help="All there are; needed where no other option says.")
    ] = False,
    max_redrives: Annotated[int, typer.Option(min=1, help="Leave alone what has come back so many times already.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Produce dead letters to the events topic again, after their cause was mended. Harmless to repeat.

    Each entry keeps the time it had, so that an old value can't replace a newer one. What would be refused again
    stays where it is; the dead-letter topic itself is only read.
    """
    settings, chosen = _settings(), _filter(agent, stage, reason, offset)
    if chosen == Filter() and not all_of_them:
        raise ConfigError("say which: --agent, --stage, --reason, --offset, or --all")
    with _progress("redriving") as on_progress:
        done = _run(
            redrive(
                settings,
                chosen,
                max_redrives=max_redrives,
                dry_run=dry_run,
                on_refused=lambda letter, why: errors.print(
                    _printable(f"{letter.partition}:{letter.offset} stays: {why}", limit=300), markup=False
                ),
                on_progress=on_progress,
            )
        )
    if as_json:
        print(json.dumps({**done._asdict(), "dry_run": dry_run}))  # noqa: T201
        return
    print(  # noqa: T201
        f"{'would redrive' if dry_run else 'redriven'} {done.redriven} of {done.matched} dead letters; "
        f"{done.refused} would be refused again, {done.duplicates} say the same as another, "
        f"{done.came_back} came back too often"
    )


def _filter(agent: str | None, stage: str | None, reason: str | None, offset: str | None = None) -> Filter:
    if stage not in (None, "worker", "sink"):
        raise ConfigError(f"--stage {stage}: it is worker or sink")
    return Filter(agent, stage, reason, None if offset is None else _offset(offset))


def _offset(text: str) -> tuple[int, int]:
    partition, _, offset = text.rpartition(":")
    if not offset.isdecimal() or not (partition or "0").isdecimal():
        raise ConfigError(f"{text!r} is no place in a topic: PARTITION:OFFSET, for instance 0:17")
    return int(partition or 0), int(offset)


def _letter_json(letter: DeadLetter) -> dict[str, Any]:
    return {
        "partition": letter.partition,
        "offset": letter.offset,
        "timestamp": when(letter.timestamp_ms),
        "dead_lettered_at": when(letter.appended_ms),
        "agent": letter.agent,
        "redrives": letter.redrives,
        "original_headers": {name: (value or b"").decode(errors="replace") for name, value in letter.original},
        **letter.said,
        "value": None if letter.value is None else letter.value.decode(errors="replace"),
    }


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal's stderr, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _printable(text: str, limit: int | None = None) -> str:
    """Make foreign text harmless on a terminal: no control characters, one line."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:limit])
