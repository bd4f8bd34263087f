"""Say why a pair's row is as it is, from what was found of it on its way."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

import msgspec

Verdict = Literal[
    "held",
    "row_newer",
    "tie",
    "no_event",
    "unreadable",
    "dead_letter",
    "not_closed",
    "batch_gone",
    "not_applied",
    "undeclared",
    "row_gone",
    "row_older",
]


class Event(msgspec.Struct):
    """An entry of the pair in the events topic; `collected_at` is the time that counts, limits applied.

    `refused`: why the worker can't use it; it has no value then.
    """

    partition: int
    offset: int
    appended_at: datetime
    collected_at: datetime | None = None
    value: str = ""
    error: str = ""
    refused: str | None = None


class Carrier(msgspec.Struct):
    """The batch that carried an event; `closed_at` is the end of its window."""

    partition: int
    offset: int
    part: int
    parts: int
    reason: str
    closed_at: datetime


class HeldRow(msgspec.Struct):
    """The pair's row in Postgres."""

    value: str
    error: str
    collected_at: datetime


class Found(msgspec.Struct):
    """What was found of a pair: its newest event, the batch of it, its row.

    `committed` and `applied` are the next offsets of worker and sink in the event's partition. `dead_letter` is the
    reason in a dead letter of this event.
    """

    agent_id: str
    key: str
    event: Event | None = None
    batch: Carrier | None = None
    row: HeldRow | None = None
    committed: int = 0
    applied: int = 0
    dead_letter: str | None = None
    is_ignoring_undeclared: bool = False


def explain(found: Found) -> tuple[Verdict, str]:
    """Return the verdict, and a sentence that says what it means and what to do."""
    event, row = found.event, found.row
    if event is None:
        if row is None:
            return "no_event", "no report with this pair is in the topic, and there is no row: does the agent send it?"
        return "held", "the row's report is no longer in the topic: retention has deleted it"
    if event.refused is not None:
        return "unreadable", f"the newest record that names the agent can't be used: {event.refused}"
    if row is not None and event.collected_at is not None:
        if row.collected_at > event.collected_at:
            return "row_newer", "the row is newer than the newest event, so the event changes nothing"
        if row.collected_at == event.collected_at:
            if (row.value, row.error) == (event.value, event.error):
                return "held", "the row holds this event"
            return _waiting(found) or ("tie", "the row holds another entry of the same time, which a replay won't undo")
    return _waiting(found) or _missing(found)


def _waiting(found: Found) -> tuple[Verdict, str] | None:
    """Say where the event is on its way, if it is."""
    event, batch = found.event, found.batch
    if found.dead_letter is not None:
        return "dead_letter", f"it is in the dead-letter topic: {found.dead_letter}"
    if batch is None and event is not None and found.committed <= event.offset:
        lag = event.offset - found.committed + 1
        return (
            "not_closed",
            f"its window is not closed, or not read yet: the worker has {lag} records to commit up to it",
        )
    if batch is not None and found.applied <= batch.offset:
        return "not_applied", f"the sink has {batch.offset - found.applied + 1} batches to apply up to its own"
    return None


def _missing(found: Found) -> tuple[Verdict, str]:
    """Say why an event that has gone all the way is not in its row."""
    if found.row is None and found.is_ignoring_undeclared:
        return "undeclared", "the pair has no row, and UNDECLARED=ignore makes none"
    if found.batch is None:
        return (
            "batch_gone",
            "its batch is no longer in the topic, and the row lacks it: `agent-metadata replay` brings it",
        )
    if found.row is None:
        return "row_gone", "it was applied, and the row is gone: `agent-metadata replay` brings it back"
    return (
        "row_older",
        "it was applied, and the row is older: another program wrote it? `agent-metadata replay` mends it",
    )
