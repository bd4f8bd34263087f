"""Logging: structured lines on stderr, for people or for machines."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable
from typing import Final, Literal

import structlog

# How often a client library's complaint is worth a line: while Kafka is away they repeat it many times a second.
_REPEAT_SECONDS: Final = 10.0


class Seldom(logging.Filter):
    """Lets through what a library says for the first time in 10 s; numbers in it count as the same.

    Our own records pass, but for those that only hand on what librdkafka said.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Make a filter; `monotonic` is its clock."""
        super().__init__()
        self._monotonic = monotonic
        self._said_at: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether the record is to be shown."""
        if record.name.startswith("pipeline"):
            event = record.msg if isinstance(record.msg, dict) else {}
            if event.get("event") != "kafka_unavailable":
                return True
            text = str(event.get("error"))
        else:
            text = record.getMessage()
        now = self._monotonic()
        self._said_at = {key: at for key, at in self._said_at.items() if now - at < _REPEAT_SECONDS}
        key = (record.name, re.sub(r"\d+", "#", text))
        return self._said_at.setdefault(key, now) == now


def without_stack_of_an_answer(record: logging.LogRecord) -> bool:
    """Drop the traceback that Faust logs of an answer of Kafka's: where in aiokafka it arrived says nothing."""
    if record.exc_info and record.exc_info[0] and record.exc_info[0].__module__ == "aiokafka.errors":
        record.exc_info = None
    return True


def configure_logging(log_format: Literal["console", "json"]) -> None:
    """Send structlog's and the standard library's records to stderr in one format; libraries from WARNING on."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        renderer: structlog.typing.Processor = structlog.processors.JSONRenderer()
        shared.append(structlog.processors.format_exc_info)
    else:
        # Not rich's tracebacks, the default where rich is installed: they show local variables, so passwords too.
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    handler.addFilter(Seldom())
    handler.addFilter(without_stack_of_an_answer)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    # asyncpg's pool logs a traceback a second while Postgres is away; the sink says so itself, in a line.
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)
