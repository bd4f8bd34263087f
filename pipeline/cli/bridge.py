"""The command `bridge`."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.console import CommandGroup, JsonOption, command_settings, print_json, run_job
from pipeline.errors import ConfigError, ExitCode
from pipeline.roles.bridge import run_bridge

app = CommandGroup()


@app.command()
def bridge(
    once: Annotated[
        bool, typer.Option("--once", help="Send the whole table once, print how much that was, and end.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Send what coder's own batcher writes to the events topic, so that the pipeline can be tried beside it.

    AGENT_METADATA_BRIDGE_DATABASE_URL names coder's database, from which it only reads; DATABASE_URL is the pipeline's
    own, where the rows must go to another table. It sends the whole table at its start, and then each row that changes:
    at once where coder notifies by Postgres, else within AGENT_METADATA_BRIDGE_POLL_SECONDS.

    Then `shadow diff` compares the two tables. docs/coder.md has the steps. SIGTERM or Ctrl-C stops it cleanly.
    """
    if as_json and not once:
        raise ConfigError("--json prints what --once has sent: give both, or neither")
    copied = run_job(run_bridge(command_settings(), once=once))
    if not once:
        return
    if copied is None:
        raise typer.Exit(ExitCode.INTERRUPTED)
    if as_json:
        print_json(copied._asdict())
    else:
        print(f"{copied.rows:,} rows sent in {copied.reports:,} reports")
