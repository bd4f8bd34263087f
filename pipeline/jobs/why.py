"""Explain a pair's row from the trace that the pair left on its way there."""

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
    """An entry of the pair in the events topic; `collected_at` is the time that counts, after clamping.

    `refused`: why the worker can't use the record, which has no value then.
    """

    partition: int
    offset: int
    appended_at: datetime
    collected_at: datetime | None = None
    value: str = ""
    error: str = ""
    refused: str | None = None


class Carrier(msgspec.Struct):
    """The batch that carried the event; `closed_at` is the end of its window."""

    partition: int
    offset: int
    part: int
    parts: int
    reason: str
    closed_at: datetime


class TableRow(msgspec.Struct):
    """The pair's row in Postgres."""

    value: str
    error: str
    collected_at: datetime


class Trace(msgspec.Struct):
    """A pair on its way: its newest event, the batch that carried the event, and its row.

    `committed` and `applied` are the next offsets of worker and sink in the event's partition. `dead_letter` is the
    reason given in a dead letter of this event. `uncommitted` records of the events topic were not searched, as they
    are in or behind an open transaction. `name` is what the agent calls itself, if that is no UUID.
    """

    agent_id: str
    key: str
    name: str | None = None
    event: Event | None = None
    batch: Carrier | None = None
    row: TableRow | None = None
    committed: int = 0
    applied: int = 0
    dead_letter: str | None = None
    uncommitted: int = 0
    is_ignoring_undeclared: bool = False


def explain(trace: Trace) -> tuple[Verdict, str]:
    """Return the verdict and its explanation: a sentence that says what it means and what to do."""
    verdict, explanation = _explain(trace)
    if trace.uncommitted:
        explanation += f"; {trace.uncommitted} more records of the topic wait in or behind an open transaction"
    return verdict, explanation


def _explain(trace: Trace) -> tuple[Verdict, str]:
    event, row = trace.event, trace.row
    if event is None:
        if row is None:
            return "no_event", "the topic has no report of this pair, and the table has no row: does the agent send it?"
        return "held", "the row's report is no longer in the topic: retention has deleted it"
    if event.refused is not None:
        return "unreadable", f"the newest record that names the agent can't be used: {event.refused}"
    if row is not None and event.collected_at is not None:
        if row.collected_at > event.collected_at:
            return "row_newer", "the row is newer than the newest event, so the event changes nothing"
        if row.collected_at == event.collected_at:
            if (row.value, row.error) == (event.value, event.error):
                return "held", "the row holds this event"
            tie = "the row holds another entry of the same time, which a replay does not replace"
            return _waiting(trace) or ("tie", tie)
    return _waiting(trace) or _missing(trace)


def _waiting(trace: Trace) -> tuple[Verdict, str] | None:
    """Say where the event is, if it has not arrived in the table: waiting, or dead-lettered."""
    event, batch = trace.event, trace.batch
    if trace.dead_letter is not None:
        return "dead_letter", f"it is in the dead-letter topic: {trace.dead_letter}"
    if batch is None and event is not None and trace.committed <= event.offset:
        lag = event.offset - trace.committed + 1
        return (
            "not_closed",
            f"its window is open, or it is not read yet: the worker has {lag} records to commit, this one included",
        )
    if batch is not None and trace.applied <= batch.offset:
        return "not_applied", f"the sink has {batch.offset - trace.applied + 1} batches to apply, this one included"
    return None


def _missing(trace: Trace) -> tuple[Verdict, str]:
    """Say why an event that has passed worker and sink is not in its row."""
    if trace.row is None and trace.is_ignoring_undeclared:
        return "undeclared", "the pair has no row, and with UNDECLARED=ignore the sink creates none"
    if trace.batch is None:
        return (
            "batch_gone",
            "its batch is no longer in the topic, and the row lacks it: `agent-metadata replay` restores it",
        )
    if trace.row is None:
        return "row_gone", "it was applied, but the row is gone: `agent-metadata replay` restores it"
    return (
        "row_older",
        "it was applied, but the row is older: did another program write it? `agent-metadata replay` repairs it",
    )
