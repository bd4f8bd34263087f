"""Logging: structured lines on stderr, for people or for machines."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable
from io import StringIO
from typing import Final, Literal, TextIO

import structlog

from pipeline.core.printable import printable

# A client library's warning is logged at most this often: in an outage of Kafka it is repeated many times a second.
_REPEAT_SECONDS: Final = 10.0


class RepeatFilter(logging.Filter):
    """Drops what a library has logged in the last 10 s already, whatever numbers are in it.

    This package's own records pass, except those that only relay an error of librdkafka's.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Make a filter; `monotonic` is its clock."""
        super().__init__()
        self._monotonic = monotonic
        self._logged_at: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether to show the record."""
        if record.name.startswith("pipeline"):
            event = record.msg if isinstance(record.msg, dict) else {}
            if event.get("event") != "kafka_unavailable":
                return True
            text = str(event.get("error"))
        else:
            text = record.getMessage()
        now = self._monotonic()
        self._logged_at = {key: at for key, at in self._logged_at.items() if now - at < _REPEAT_SECONDS}
        key = (record.name, re.sub(r"\d+", "#", text))
        return self._logged_at.setdefault(key, now) == now


def without_kafka_traceback(record: logging.LogRecord) -> bool:
    """Drop the traceback that Faust logs with an error from Kafka: where in aiokafka it was raised is of no help."""
    if record.exc_info and record.exc_info[0] and record.exc_info[0].__module__ == "aiokafka.errors":
        record.exc_info = None
    return True


def _printable_fields(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Escape what a terminal would obey: the keys, values and errors in a log come from others."""
    return {name: printable(value) if isinstance(value, str) else value for name, value in event.items()}


def _printable_traceback(out: TextIO, exc_info: structlog.typing.ExcInfo) -> None:
    """Write a plain traceback: rich's, the default where rich is installed, shows local variables, so passwords too."""
    text = StringIO()
    structlog.dev.plain_traceback(text, exc_info)
    out.write("\n".join(map(printable, text.getvalue().split("\n"))))


def configure_logging(log_format: Literal["console", "json"]) -> None:
    """Send structlog's and the standard library's records to stderr in one format; libraries from WARNING on."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        rendering: list[structlog.typing.Processor] = [structlog.processors.JSONRenderer()]
        shared.append(structlog.processors.format_exc_info)
    else:
        console = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=_printable_traceback)
        rendering = [_printable_fields, console]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *rendering],
        )
    )
    handler.addFilter(RepeatFilter())
    handler.addFilter(without_kafka_traceback)
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    # asyncpg's pool logs a traceback a second while Postgres is unavailable; the sink itself logs that in one line.
    logging.getLogger("asyncpg").setLevel(logging.CRITICAL)
