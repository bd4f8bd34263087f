"""The file that a replay resumes from: its format must stay readable for files that were written earlier."""

import json
from datetime import UTC, datetime

import pytest

from pipeline.errors import ConfigError
from pipeline.kafka.range_reader import OffsetRange
from pipeline.replay.plan import ReplayPlan, load_plan, save_plan
from pipeline.replay.replay import PairFilter, Summary

AGENT = "00112233-4455-6677-8899-aabbccddeeff"
FILE = {
    "source": "events",
    "topic": "agent-metadata.events.v1",
    "topic_id": "x9Tq",
    "start": "2026-01-02T03:04:05Z",
    "end": None,
    "agent_ids": [AGENT],
    "keys": ["cpu"],
    "ranges": [{"partition": 0, "start": 5, "end": 17}, {"partition": 1, "start": 0, "end": 3}],
    "done": [0],
    "summary": {"records": 12, "entries": 24, "dead": 0, "pairs": 2, "changed": 2, "undeclared": 0, "refused": 0},
    "version": 1,
}


def test_plan_is_read_and_written_in_the_same_form(tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(FILE))
    plan = load_plan(file)
    assert plan == ReplayPlan(
        "events",
        FILE["topic"],
        "x9Tq",
        datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        None,
        [AGENT],
        ["cpu"],
        [OffsetRange(0, 5, 17), OffsetRange(1, 0, 3)],
        [0],
        Summary(12, 24, 0, 2, 2),
    )
    assert plan.only == PairFilter(frozenset({AGENT}), frozenset({"cpu"}))
    assert plan.left == [OffsetRange(1, 0, 3)]
    save_plan(plan, file)
    assert json.loads(file.read_text()) == FILE


def test_file_that_does_not_exist_is_no_plan(tmp_path):
    assert load_plan(tmp_path / "plan.json") is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("{}", "not the file of a replay"), (json.dumps(FILE | {"version": 2}), "has version 2")],
)
def test_file_that_is_not_a_plan_is_refused(tmp_path, text, complaint):
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        load_plan(file)
