"""What the demo checks."""

import json
from datetime import UTC, datetime, timedelta

from pipeline.local.demo_check import Changes, Metrics
from pipeline.local.simulate import Oracle, Simulated, agent_id, agent_name, read_oracle

T0 = datetime(2024, 1, 1, tzinfo=UTC)


def line(agent, key, at, notified_after=None):
    change = {
        "agent_id": agent,
        "key": key,
        "collected_at": at.isoformat(),
        "notified_at": None if notified_after is None else at.timestamp() + notified_after,
    }
    return json.dumps(change).encode() + b"\n"


def test_line_that_is_still_being_written_is_read_once_it_is_whole(tmp_path):
    path = tmp_path / "watch.out"
    changes = Changes(path)
    first, second = line("a", "k", T0), line("b", "k", T0)
    path.write_bytes(first + second[:20])
    changes.read()
    assert changes.newest == {("a", "k"): T0}
    path.write_bytes(first + second)
    changes.read()
    changes.read()
    assert changes.newest == {("a", "k"): T0, ("b", "k"): T0}


def test_agent_is_missed_unless_each_of_its_final_values_was_heard(tmp_path):
    path = tmp_path / "watch.out"
    later = T0 + timedelta(seconds=1)
    path.write_bytes(line("a", "k", T0) + line("a", "k", later) + line("b", "k", T0) + line("b", "l", later))
    changes = Changes(path)
    changes.read()
    expected = dict.fromkeys([("a", "k"), ("b", "k"), ("b", "l"), ("c", "k")], ("v", "", later))
    assert changes.missed_agents(expected) == {"b", "c"}


def test_freshness_counts_only_what_was_notified(tmp_path):
    path = tmp_path / "watch.out"
    changes = Changes(path)
    path.write_bytes(line("a", "k", T0))
    changes.read()
    assert (changes.recent_freshness(), changes.freshness_percentiles()) == (None, {"p50": None, "p99": None})
    path.write_bytes(line("a", "k", T0) + b"".join(line("b", "k", T0, seconds) for seconds in (1, 2, 3)))
    changes.read()
    assert (changes.recent_freshness(), changes.freshness_percentiles()["p50"]) == (2, 2)
    assert changes.notified_agents == {"b"}


def test_role_that_does_not_answer_counts_as_no_metrics():
    metrics = Metrics.scrape([1])
    assert (metrics.sums["rows_written"], metrics.batches_by_reason) == (0, {})


def test_oracle_is_read_as_it_was_written(tmp_path):
    oracle = Oracle()
    identity = agent_id(1)
    oracle.note(Simulated(0.0, agent_name(1), ["cpu", "disk"], ["1%", ""], ["", "timed out"]), T0)
    oracle.write(tmp_path / "oracle")
    assert read_oracle(tmp_path / "oracle") == {
        (str(identity), "cpu"): ("1%", "", T0),
        (str(identity), "disk"): ("", "timed out", T0),
    }
