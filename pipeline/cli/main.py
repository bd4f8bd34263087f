"""The command `agent-metadata` itself, and the commands that run roles, show the settings, or run the demo."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from pipeline.cli import bridge, dead_letter, mapping, prepare, produce, replay, status, watch
from pipeline.cli.console import (
    CommandGroup,
    JsonOption,
    command_settings,
    complain,
    print_json,
    run_job,
    stderr,
    write_to_any_terminal,
)
from pipeline.core.printable import printable
from pipeline.errors import ConfigError, ExitCode, PipelineError
from pipeline.formats.encoder import ReportFormat
from pipeline.local.demo import DemoOptions, run_demo
from pipeline.local.services import ServicesKind
from pipeline.monitoring.logs import configure_logging
from pipeline.roles.serve import run_serve
from pipeline.roles.sink import run_sink
from pipeline.roles.supervisor import Supervisor
from pipeline.roles.worker import run_worker
from pipeline.settings import describe_settings

app = CommandGroup(
    help="""Carry live agent metadata from Kafka to Postgres, and on to listeners.

    Start with `demo`, which needs no set-up. A deployment needs `topics create` and `db migrate` once, then `run`.

    Settings are environment variables: KAFKA_BOOTSTRAP_SERVERS, DATABASE_URL and AGENT_METADATA_*; `config` lists them.

    Exit codes: 0 success, 1 failure, 2 wrong usage or setting.""",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; every error that a user can cause ends in one line on stderr and exit code 1 or 2."""
    write_to_any_terminal()
    try:
        app()
    except ConfigError as error:
        _fail(error, ExitCode.USAGE)
    except PipelineError as error:
        _fail(error, ExitCode.FAILURE)
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)


def _fail(error: PipelineError, code: ExitCode) -> None:
    complain(f"agent-metadata: {error}")
    sys.exit(code)


@app.command()
def run() -> None:
    """Run a worker and a sink as two processes and restart either when it ends: enough for a small deployment.

    The sink serves its metrics one port above the worker's (AGENT_METADATA_METRICS_PORT). SIGTERM or Ctrl-C stops both
    cleanly.
    """
    port = command_settings().metrics_port
    supervisor = Supervisor(
        {
            "worker": {"AGENT_METADATA_METRICS_PORT": str(port)},
            "sink": {"AGENT_METADATA_METRICS_PORT": str(port + 1 if port else 0)},
        }
    )
    sys.exit(run_job(supervisor.run()))


@app.command()
def worker() -> None:
    """Fold reports into windows, and publish each closed window as batches. SIGTERM or Ctrl-C stops it cleanly."""
    run_job(run_worker(command_settings()))


@app.command()
def sink() -> None:
    """Apply batches to Postgres: rows, progress and NOTIFY in one transaction. SIGTERM or Ctrl-C stops it cleanly."""
    run_job(run_sink(command_settings()))


@app.command()
def serve() -> None:
    """Serve the live page, the HTTP API and event streams. SIGTERM or Ctrl-C stops it cleanly.

    AGENT_METADATA_SERVE_HOST and AGENT_METADATA_SERVE_PORT say where; clients need AGENT_METADATA_SERVE_TOKEN, if set.
    """
    run_job(run_serve(command_settings()))


app.add_typer(watch.app)
app.add_typer(produce.app)
app.add_typer(mapping.app)
app.add_typer(bridge.app)


@app.command()
def demo(
    agents: Annotated[int, typer.Option(metavar="N", min=1, help="How many agents to simulate.")] = 200,
    keys: Annotated[int, typer.Option(metavar="N", min=1, max=200, help="Metadata keys of each agent.")] = 10,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.01, help="Time between two reports of one agent.")
    ] = 1.0,
    window: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, max=3600, help="Length of the worker's windows.")
    ] = 5.0,
    duration: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS", min=1, help="How long the agents report.", show_default="30, or 600 with --serve"
        ),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the live page meanwhile, at AGENT_METADATA_SERVE_PORT.")
    ] = False,
    report_format: Annotated[
        ReportFormat,
        typer.Option("--format", help="How the agents write their reports; all but json need a schema registry."),
    ] = "json",
    services: Annotated[
        ServicesKind | None,
        typer.Option(
            help="Where Kafka and Postgres come from: given by the environment, Docker, packages, or packages with an "
            "embedded stand-in for Kafka.",
            show_default="env where its variable is set, else packages",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Run the whole pipeline on this machine, and compare the table with what was produced.

    It starts Kafka and Postgres (unless KAFKA_BOOTSTRAP_SERVERS and DATABASE_URL name some), simulated agents, a
    worker, a sink and a listener, and stops them all at the end. Exit code 1 unless every row is right.
    """
    configure_logging("console")
    seconds = duration or (600.0 if serve else 30.0)
    summary = run_demo(
        DemoOptions(agents, keys, interval, window, seconds, services, serve, report_format), console=stderr
    )
    if as_json:
        print_json(summary)
    else:
        table = Table("demo", "", show_header=False)
        for name, value in summary.items():
            table.add_row(name, json.dumps(value) if isinstance(value, dict) else str(value))
        Console().print(table)
    if summary["mismatched_rows"]:
        raise PipelineError(f"{summary['mismatched_rows']} rows differ from what was produced")


@app.command()
def config(as_json: JsonOption = False) -> None:
    """Print every setting with its value and origin: environment, file or default. Secrets are masked."""
    described = describe_settings(command_settings())
    if as_json:
        print_json({variable: {"value": value, "origin": origin} for variable, value, origin in described})
        return
    width = max(len(variable) for variable, _, _ in described)
    for variable, value, origin in described:
        print(printable(f"{variable:{width}}  {value}  ({origin})"))


app.add_typer(prepare.topics_app, name="topics")
app.add_typer(prepare.db_app, name="db")
app.add_typer(status.app)
app.add_typer(dead_letter.app, name="dead-letter")
app.add_typer(replay.app)
