"""The command `map`: what a record becomes, without Kafka and Postgres."""

import json
import os
import subprocess
import sys

import pytest

from pipeline.core.report import agent_uuid

MAPPING = """
[mapping]
id = "payload.after.name"
time = "payload.source.ts_ms"
time_format = "milliseconds"
entries = "payload.after"
exclude = ["id"]
"""
ROW = {"id": 1, "name": "press-4", "status": "running", "load": 0.75}
INSERT = {"payload": {"before": None, "after": ROW, "source": {"ts_ms": 1_767_323_045_678}, "op": "c"}}
DELETE = {"payload": {"before": ROW, "after": None, "source": {"ts_ms": 1_767_323_045_679}, "op": "d"}}
NAMELESS = {"payload": {"after": {"id": 2, "status": None}}}


@pytest.fixture
def run(tmp_path):
    """Return what runs `map` on a sample, given as JSON values or bytes, with these settings."""

    def run_map(sample, *arguments, toml="", **variables):
        (tmp_path / "settings.toml").write_text(toml)
        raw = sample if isinstance(sample, bytes) else "".join(json.dumps(value) + "\n" for value in sample).encode()
        (tmp_path / "sample").write_bytes(raw)
        clean = {name: text for name, text in os.environ.items() if not name.startswith("AGENT_METADATA_")}
        return subprocess.run(
            [sys.executable, "-m", "pipeline", "map", "--sample", str(tmp_path / "sample"), *arguments],
            env={**clean, "AGENT_METADATA_CONFIG_FILE": str(tmp_path / "settings.toml"), **variables},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run_map


def test_each_line_is_a_record_and_a_dead_letter_among_them_exits_with_1(run):
    done = run([INSERT, DELETE, NAMELESS], toml=MAPPING)
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines() == [
        f"record 1: agent press-4 (its UUID is {agent_uuid('press-4')})",
        "  load    0.75     2026-01-02T03:04:05.678000Z",
        "  status  running  2026-01-02T03:04:05.678000Z",
        "record 2: nothing: no entries, and no dead letter either",
        "record 3: a dead letter: the record does not fit [mapping]: id, at payload.after.name: missing",
    ]


def test_record_over_several_lines_is_one_and_json_says_it_all(run):
    done = run(json.dumps(INSERT, indent=2).encode(), "--json", toml=MAPPING)
    assert (done.returncode, done.stderr) == (0, "")
    at = "2026-01-02T03:04:05.678000Z"
    assert json.loads(done.stdout) == {
        "record": 1,
        "agents": [
            {
                "agent_id": agent_uuid("press-4"),
                "name": "press-4",
                "entries": [
                    {"key": "load", "value": "0.75", "error": "", "collected_at": at},
                    {"key": "status", "value": "running", "error": "", "collected_at": at},
                ],
            }
        ],
        "dead_letter": None,
    }


def test_record_key_and_headers_are_read(run):
    toml = '[mapping]\nid = ["record:key", "header:site"]\nentries = "."\n'
    done = run([{"cpu": 12, "note": "a\x1b[2J"}], "--key", "press-4", "--header", "site=north=1", toml=toml)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("agent press-4/north=1 (")
    assert done.stdout.splitlines()[1:] == [
        "  cpu   12        (the record's timestamp)",
        r"  note  a\x1b[2J  (the record's timestamp)",
    ]


def test_part_that_would_be_a_dead_letter_exits_with_1_and_shows_the_rest(run):
    toml = '[mapping]\nid = "id"\nentries = "."\n'
    done = run([{"id": "a", "k" * 128: 1, "cpu": 12}], toml=toml)
    assert done.returncode == 1
    assert "  cpu  12  " in done.stdout
    assert "the rest is a dead letter: key of 128 characters exceeds 127" in done.stdout


def test_own_reports_and_metrics_of_a_collector_are_shown_too(run):
    done = run([{"agent_id": "host-17", "entries": [{"key": "cpu", "value": 12}]}])
    assert (done.returncode, done.stdout.splitlines()[1]) == (0, "  cpu  12  (the record's timestamp)")
    gauge = {"name": "load", "gauge": {"dataPoints": [{"asDouble": 0.5}]}}
    host = {"attributes": [{"key": "host.name", "value": {"stringValue": "web-1"}}]}
    metrics = {"resourceMetrics": [{"resource": host, "scopeMetrics": [{"metrics": [gauge]}]}]}
    done = run([metrics], AGENT_METADATA_EVENTS_FORMAT="otlp_json")
    assert (done.returncode, done.stdout.splitlines()[1]) == (0, "  load  0.5  (the record's timestamp)")


@pytest.mark.parametrize(
    ("sample", "arguments", "complaint"),
    [
        (b"", [], "the file is empty"),
        (b"{}", ["--header", "site"], "--header 'site': write NAME=VALUE"),
        (b"{}", ["--sample", "/nowhere"], "--sample /nowhere: No such file or directory"),
    ],
)
def test_wrong_usage_exits_with_2(run, sample, arguments, complaint):
    done = run(sample, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert complaint in done.stderr
