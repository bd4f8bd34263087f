"""The command `watch`: changed rows as a live table or as JSON lines."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Final

import typer
from rich.live import Live
from rich.table import Table

from pipeline.cli.console import (
    CommandGroup,
    JsonOption,
    agent_ids,
    command_settings,
    print_json,
    run_job,
    shown,
)
from pipeline.listener import Change, MetadataListener
from pipeline.postgres.connections import require_sessions
from pipeline.settings import Settings

_MOST_ROWS: Final = 40
_MOST_CHARACTERS: Final = 120

app = CommandGroup()


@app.command()
def watch(
    agents: Annotated[
        list[str] | None, typer.Argument(metavar="AGENT", help="UUIDs or names of agents.", show_default="all agents")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show rows as they change: a live table on a terminal, else a JSON line for each change. Ctrl-C ends it."""
    settings = command_settings()
    watched = [uuid.UUID(agent) for agent in agent_ids(agents, name="AGENT")] if agents else None
    show = _print_change if as_json or not sys.stdout.isatty() else _LiveTable().show
    run_job(_watch(settings, watched, show))


async def _watch(settings: Settings, watched: list[uuid.UUID] | None, show: Callable[[Change], None]) -> None:
    url, url_setting = settings.listener_url()
    await require_sessions(url, url_setting)  # at the start an unreachable Postgres is an error, later an outage
    async for change in MetadataListener(url, watched, url_setting=url_setting).changes():
        show(change)


def _print_change(change: Change) -> None:
    line = {
        "agent_id": str(change.agent_id),
        "name": change.name,
        "key": change.key,
        "value": change.value,
        "error": change.error,
        "collected_at": change.collected_at.isoformat(),
        "notified_at": change.notified_at,
    }
    print_json(line)


class _LiveTable:
    """The rows that changed last, redrawn a few times a second."""

    def __init__(self) -> None:
        self._changes: dict[tuple[uuid.UUID, str], Change] = {}
        self._live = Live(get_renderable=self._draw, refresh_per_second=4, screen=False)
        self._live.start()

    def show(self, change: Change) -> None:
        pair = (change.agent_id, change.key)
        self._changes.pop(pair, None)
        self._changes[pair] = change
        while len(self._changes) > _MOST_ROWS:
            self._changes.pop(next(iter(self._changes)))

    def _draw(self) -> Table:
        table = Table("agent", "key", "value", "error", "age", title="agent metadata, latest changes last")
        now = datetime.now().astimezone()
        for change in self._changes.values():
            age = f"{max(0.0, (now - change.collected_at).total_seconds()):.0f} s"
            texts = (change.name or str(change.agent_id), change.key, change.value, change.error, age)
            table.add_row(*(shown(text, limit=_MOST_CHARACTERS) for text in texts))
        return table
