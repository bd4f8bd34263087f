"""What is said about a record that could not be used: its headers on the dead-letter topic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

Stage = Literal["worker", "sink"]
Headers = Sequence[tuple[str, bytes]]

# Kafka Connect's names, so that existing tools show and redrive these records.
_PREFIX: Final = "__connect.errors."
_MAX_MESSAGE_CHARS: Final = 1000


def dead_letter_headers(
    *,
    topic: str,
    partition: int,
    offset: int,
    stage: Stage,
    error_class: str,
    message: str,
    sqlstate: str | None = None,
    original: Headers = (),
) -> list[tuple[str, bytes]]:
    """Return the original headers and, behind them, where the record was and why it was refused."""
    said = {
        "topic": topic,
        "partition": str(partition),
        "offset": str(offset),
        "stage": stage,
        "exception.class.name": error_class,
        "exception.message": message[:_MAX_MESSAGE_CHARS],
    }
    if sqlstate is not None:
        said["sqlstate"] = sqlstate
    return [*original, *((_PREFIX + name, text.encode()) for name, text in said.items())]
