"""What all commands share: their help, what they print, the settings with their log format, and the event loop."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from io import TextIOWrapper
from typing import Annotated, Any, TypeVar

import msgspec
import typer
import uvloop
from rich.console import Console
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from pipeline.core.printable import printable
from pipeline.core.report import identify
from pipeline.errors import ConfigError, DecodeError
from pipeline.monitoring.logs import configure_logging
from pipeline.settings import Settings, load_settings

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
stderr = Console(stderr=True, soft_wrap=True, highlight=False)

T = TypeVar("T")


class _PlainHelp:
    """Help in which a flag shows no type, and a docstring's paragraph is filled to the width of the terminal."""

    def __init__(self, *arguments: Any, help: str | None = None, **options: Any) -> None:  # noqa: A002  # Typer's name
        filled = help and re.sub(r"(?<!\n)\n(?!\n)", " ", help)
        super().__init__(*arguments, help=filled, **options)  # type: ignore[call-arg]  # as get_params()

    def get_params(self, context: Any) -> list[Any]:
        params: list[Any] = super().get_params(context)  # type: ignore[misc]  # the command's, which this is mixed into
        for param in params:
            if getattr(param, "is_bool_flag", False):
                param.metavar = ""  # Typer writes <bool>, though a flag takes no value
        return params


class _Command(_PlainHelp, TyperCommand):
    pass


class _Group(_PlainHelp, TyperGroup):
    pass


class CommandGroup(typer.Typer):
    """A group of commands with plain help, which it shows when no command is given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=_Group, no_args_is_help=True, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Any], Any]:
        """Add a command; see typer.Typer.command()."""
        return super().command(name, **{"cls": _Command, **options})


def command_settings(**overrides: Any) -> Settings:
    """Load the settings, and log as they say."""
    settings = load_settings(**overrides)
    configure_logging(settings.log_format)
    return settings


def run_job(job: Awaitable[T]) -> T:
    """Run one job on an event loop of its own; return its result."""

    async def wrapped() -> T:
        return await job

    return uvloop.run(wrapped())


def write_to_any_terminal() -> None:
    """Escape what the encoding of stdout or stderr lacks, instead of failing at it."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def shown(text: object, limit: int | None = None) -> Text:
    """Return printable() text for rich, which then sees neither markup nor emoji codes in it."""
    return Text(printable(str(text), limit))


def complain(text: object, limit: int | None = None) -> None:
    """Print one line to stderr, whatever is in the text, above a progress bar that is on the screen."""
    stderr.print(shown(text, limit))


def print_json(value: Any) -> None:
    """Print a value, msgspec structs included, as one line of JSON in ASCII, which every terminal can show."""
    print(json.dumps(msgspec.to_builtins(value)), flush=True)


def identified(agent: str, *, name: str) -> tuple[str, str | None]:
    """Return the UUID of an agent that is given by UUID or name, and the name if it is one.

    Raises:
        ConfigError: a name is empty, or too long; it calls the option `name`.
    """
    try:
        return identify(agent)
    except DecodeError as error:
        raise ConfigError(f"{name}: {error}") from None


def agent_ids(agents: Sequence[str] | None, *, name: str = "--agent") -> frozenset[str]:
    """Return the UUIDs of agents, as `identified` does."""
    return frozenset(identified(agent, name=name)[0] for agent in agents or ())
