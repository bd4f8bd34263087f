"""Each place where a pair's event can be, and the explanation for it."""

from datetime import UTC, datetime, timedelta

import pytest

from pipeline.jobs.why import Carrier, Event, TableRow, Trace, explain

T0 = datetime(2024, 1, 1, tzinfo=UTC)
EVENT = Event(0, 10, T0, T0, "v")
OLDER, SAME, NEWER = (TableRow("v", "", T0 + timedelta(seconds=seconds)) for seconds in (-1, 0, 1))
BATCH = Carrier(0, 5, 1, 1, "scheduled", T0)


@pytest.mark.parametrize(
    ("verdict", "fields"),
    [
        ("no_event", {}),
        ("held", {"row": SAME}),
        ("held", {"event": EVENT, "row": SAME}),
        ("row_newer", {"event": EVENT, "row": NEWER}),
        ("tie", {"event": EVENT, "row": TableRow("w", "", T0), "batch": BATCH, "applied": 6, "committed": 11}),
        ("not_applied", {"event": EVENT, "row": TableRow("w", "", T0), "batch": BATCH, "applied": 5, "committed": 11}),
        ("unreadable", {"event": Event(0, 10, T0, refused="not a report"), "row": OLDER}),
        ("dead_letter", {"event": EVENT, "batch": BATCH, "applied": 6, "dead_letter": "SQLSTATE 23514"}),
        ("not_closed", {"event": EVENT, "row": OLDER, "committed": 10}),
        ("not_applied", {"event": EVENT, "row": OLDER, "batch": BATCH, "applied": 5, "committed": 11}),
        ("not_applied", {"event": EVENT, "batch": BATCH, "applied": 0}),
        ("undeclared", {"event": EVENT, "batch": BATCH, "applied": 6, "is_ignoring_undeclared": True}),
        ("batch_gone", {"event": EVENT, "row": OLDER, "committed": 11, "applied": 6}),
        ("row_gone", {"event": EVENT, "batch": BATCH, "applied": 6, "committed": 11}),
        ("row_older", {"event": EVENT, "row": OLDER, "batch": BATCH, "applied": 6, "committed": 11}),
    ],
)
def test_verdict_names_the_place_where_the_event_is(verdict, fields):
    assert explain(Trace("agent", "key", **fields))[0] == verdict


def test_explanation_counts_what_is_before_the_event():
    assert "2 records to commit" in explain(Trace("agent", "key", event=EVENT, committed=9))[1]
    assert "3 batches to apply" in explain(Trace("agent", "key", event=EVENT, batch=BATCH, applied=3))[1]


def test_explanation_says_that_records_behind_a_transaction_were_not_searched():
    verdict, explanation = explain(Trace("agent", "key", event=EVENT, row=SAME, uncommitted=7))
    assert (verdict, explanation.partition("; ")[2].split()[0]) == ("held", "7")
