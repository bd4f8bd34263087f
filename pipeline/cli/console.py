"""What all commands share: where errors go, the settings with their log format, and the event loop."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Annotated, Any, Final

import typer
import uvloop
from rich.console import Console

from pipeline.core.report import canonical_agent_id
from pipeline.errors import ConfigError, DecodeError
from pipeline.monitoring.logs import configure_logging
from pipeline.settings import Settings, load_settings

EXIT_FAILURE: Final = 1
EXIT_USAGE: Final = 2

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
errors = Console(stderr=True, soft_wrap=True, highlight=False)


def command_settings(**overrides: Any) -> Settings:
    """Load the settings, and log as they say."""
    settings = load_settings(**overrides)
    configure_logging(settings.log_format)
    return settings


def run_job(job: Awaitable[Any]) -> Any:
    """Run one job on an event loop of its own; return what it returns."""

    async def wrapped() -> Any:
        return await job

    return uvloop.run(wrapped())


def printable(text: str, limit: int | None = None) -> str:
    """Make foreign text harmless on a terminal: no control characters, one line."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:limit])


def canonical_agents(agents: Sequence[str] | None, *, name: str = "--agent") -> frozenset[str]:
    """Read agent ids as they were given; `name` is what the error calls them.

    Raises:
        ConfigError: one is no UUID.
    """
    try:
        return frozenset(canonical_agent_id(text) for text in agents or ())
    except DecodeError as error:
        raise ConfigError(f"{name}: {error}") from None
