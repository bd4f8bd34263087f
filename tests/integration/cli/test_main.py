"""The command line against real services: topics, tables, producing, and how processes start and stop."""

import asyncio
import json
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from urllib.parse import urlsplit

import asyncpg
import pytest
from confluent_kafka import Consumer, TopicPartition

from pipeline.core.notify import NOTIFY_CHANNEL, encode_agent_id_chunks
from pipeline.local.deployment import Deployment
from tests.support.coder import CODERS_TABLES

pytestmark = pytest.mark.services

A1 = "0b7c1e1c-3a54-4be5-9f0e-2a8f7b1ac001"


@pytest.fixture
def environment(bootstrap_servers, database_url, tmp_path):
    """Settings with topics and groups of their own, of 2 partitions."""
    deployment = Deployment(
        bootstrap_servers, database_url, tmp_path, partitions=2, window_seconds=0.5, log_format="json"
    )
    ours = ("AGENT_METADATA_", "PIPELINE_")
    inherited = {variable: value for variable, value in os.environ.items() if not variable.startswith(ours)}
    return inherited | deployment.environment


@pytest.fixture
def agent_metadata(environment):
    """Return a function that runs a command to its end."""

    def run(*arguments, stdin="", **variables):
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments],
            env={**environment, **variables},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.fixture
def topics(agent_metadata):
    assert agent_metadata("topics", "create").returncode == 0


@pytest.fixture
def tables(agent_metadata):
    assert agent_metadata("db", "migrate").returncode == 0


def complaint(done):
    """Return the one line on stderr."""
    (line,) = done.stderr.splitlines()
    assert line.startswith("agent-metadata: ")
    return line


def test_topics_create_makes_what_is_missing_and_then_nothing(agent_metadata, environment):
    done = agent_metadata("topics", "create")
    assert (done.returncode, done.stderr) == (0, "")
    roles = ("EVENTS", "BATCHES", "DEAD_LETTER")
    made = {f"created {environment[f'AGENT_METADATA_{role}_TOPIC']}" for role in roles}
    assert set(done.stdout.splitlines()) == made
    assert agent_metadata("topics", "create").stdout == "all topics exist\n"


def test_topics_diff_of_topics_just_created_finds_none(agent_metadata, topics):
    done = agent_metadata("topics", "diff")
    assert (done.returncode, done.stdout, done.stderr) == (0, "the cluster's topics are as declared\n", "")


def test_topics_diff_after_a_partition_mismatch_exits_with_1_and_names_it(agent_metadata, topics, environment):
    done = agent_metadata("topics", "diff", AGENT_METADATA_PARTITIONS="3")
    assert (done.returncode, done.stderr) == (1, "")
    names = (environment["AGENT_METADATA_EVENTS_TOPIC"], environment["AGENT_METADATA_BATCHES_TOPIC"])
    assert set(done.stdout.splitlines()) == {f"{name}: partitions is 2, declared 3" for name in names}


def test_topics_diff_as_json_prints_the_differences(agent_metadata, environment):
    done = agent_metadata("topics", "diff", "--json")
    assert done.returncode == 1
    assert {
        "topic": environment["AGENT_METADATA_EVENTS_TOPIC"],
        "field": "topic",
        "declared": "exists",
        "actual": "missing",
    } in json.loads(done.stdout)


def test_db_status_of_an_empty_database_exits_with_1_and_names_what_is_missing(agent_metadata):
    done = agent_metadata("db", "status")
    assert (done.returncode, done.stderr) == (1, "")
    assert "0001_metadata: MISSING" in done.stdout.splitlines()


def test_db_migrate_applies_once_and_status_exits_with_0_then(agent_metadata):
    first = agent_metadata("db", "migrate")
    assert (first.returncode, first.stderr) == (0, "")
    assert "applied 0001_metadata" in first.stdout.splitlines()
    assert agent_metadata("db", "migrate").stdout == "the database is up to date\n"
    status = agent_metadata("db", "status", "--json")
    assert status.returncode == 0
    assert [item["changed"] for item in json.loads(status.stdout) if item["applied_at"]] == [False] * 4


def test_produce_from_stdin_sends_good_lines_and_names_the_bad_one(agent_metadata, topics, environment):
    good = json.dumps({"agent_id": A1, "entries": [{"key": "cpu", "value": "12%"}]})
    done = agent_metadata("produce", "--json", stdin=f"{good}\n\n{{bad\n")
    assert done.returncode == 1
    assert json.loads(done.stdout) == {
        "reports": 1,
        "entries": 1,
        "empty": 0,
        "dropped": 0,
        "refused": 1,
        "not_acknowledged": 0,
    }
    # A broker that was never asked for a producer's id may be slow to give one, which is logged too.
    bad_line, *_, advice = done.stderr.splitlines()
    assert bad_line.startswith("line 3: not a report")
    assert advice == "agent-metadata: some reports were not accepted: see above"
    assert values_of(environment["KAFKA_BOOTSTRAP_SERVERS"], environment["AGENT_METADATA_EVENTS_TOPIC"]) == [
        {"agent_id": A1, "entries": [{"key": "cpu", "value": "12%"}]}
    ]


def test_produce_of_good_lines_exits_with_0(agent_metadata, topics):
    line = json.dumps({"agent_id": A1.upper(), "entries": [{"key": "k", "value": "v"}]})
    done = agent_metadata("produce", stdin=line)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "1 reports, 1 entries, 0 empty, 0 dropped, 0 refused, 0 not_acknowledged\n"


def test_produce_of_a_report_without_entries_counts_it_apart_and_sends_nothing(agent_metadata, topics, environment):
    done = agent_metadata("produce", "--json", stdin=json.dumps({"agent_id": A1, "entries": []}))
    assert (done.returncode, done.stderr) == (0, "")
    counts = json.loads(done.stdout)
    assert (counts["reports"], counts["empty"]) == (0, 1)
    assert values_of(environment["KAFKA_BOOTSTRAP_SERVERS"], environment["AGENT_METADATA_EVENTS_TOPIC"]) == []


def test_produce_of_too_many_key_bytes_says_so_and_sends_what_came_before(agent_metadata, topics, environment):
    entries = [{"key": f"{number:0100}", "value": "v"} for number in range(63)]
    done = agent_metadata("produce", stdin=json.dumps({"agent_id": A1, "entries": entries}))
    assert done.returncode == 1
    assert "line 1: keys exceeded 6144 bytes: the last 2 entries were left out" in done.stderr
    (sent,) = values_of(environment["KAFKA_BOOTSTRAP_SERVERS"], environment["AGENT_METADATA_EVENTS_TOPIC"])
    assert sent["entries"] == entries[:-2]


def values_of(servers, topic):
    consumer = Consumer({"bootstrap.servers": servers, "group.id": topic, "enable.partition.eof": True})
    found, ended = [], 0
    try:
        consumer.assign([TopicPartition(topic, number, 0) for number in (0, 1)])
        while ended < 2:
            record = consumer.poll(30)
            assert record is not None
            if record.error():
                ended += 1
            else:
                found.append(json.loads(record.value()))
    finally:
        consumer.close()
    return found


@pytest.mark.parametrize("command", ["worker", "sink", "produce"])
def test_start_without_topics_exits_with_1_and_says_how_to_make_them(agent_metadata, tables, command):
    done = agent_metadata(command)
    assert (done.returncode, done.stdout) == (1, "")
    assert "run `agent-metadata topics create`" in complaint(done)


def test_sink_without_tables_exits_with_1_and_says_how_to_make_them(agent_metadata, topics):
    done = agent_metadata("sink")
    assert (done.returncode, done.stdout) == (1, "")
    message = complaint(done)
    assert "lacks 0001_metadata" in message
    assert "run `agent-metadata db migrate`" in message


@pytest.mark.parametrize(("undeclared", "starts"), [("insert", False), ("ignore", True)])
async def test_sink_on_coders_own_table_starts_only_where_undeclared_pairs_are_ignored(
    agent_metadata, environment, database_url, topics, undeclared, starts
):
    connection = await asyncpg.connect(database_url)
    await connection.execute(CODERS_TABLES)
    await connection.close()
    assert agent_metadata("db", "migrate").returncode == 0
    if starts:
        with Running({**environment, "AGENT_METADATA_UNDECLARED": undeclared}, "sink") as sink:
            sink.wait_for("partitions_assigned")
        return
    done = agent_metadata("sink", AGENT_METADATA_UNDECLARED=undeclared)
    assert (done.returncode, done.stdout) == (2, "")
    message = complaint(done)
    assert "takes no new rows: display_name, script, timeout, interval can't be null" in message
    assert "set AGENT_METADATA_UNDECLARED=ignore, or give them defaults" in message


@pytest.mark.parametrize(("part", "sqlstate"), [("password", "28P01"), ("database", "3D000")])
def test_sink_that_postgres_does_not_let_in_says_what_to_check(agent_metadata, topics, environment, part, sqlstate):
    url = urlsplit(environment["DATABASE_URL"])
    if part == "password":
        url = url._replace(netloc=f"{url.username}:wrong-pony@{url.hostname}:{url.port}")
    else:
        url = url._replace(path="/nowhere")
    done = agent_metadata("sink", DATABASE_URL=url.geturl())
    assert (done.returncode, done.stdout) == (2, "")
    line = complaint(done)
    assert sqlstate in line
    assert line.endswith("; check user, password and database in DATABASE_URL")
    assert "wrong-pony" not in line


class Running:
    """A command that runs until it is stopped, at the latest when the test ends."""

    def __init__(self, environment, *arguments):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "pipeline", *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.output = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._process.stdout.close()

    def wait_for(self, *events):
        """Read its output until all events are in it."""
        deadline = time.monotonic() + 60
        while not all(event in self.output for event in events):
            ready, _, _ = select.select([self._process.stdout], [], [], max(0, deadline - time.monotonic()))
            assert ready, self.output
            data = os.read(self._process.stdout.fileno(), 65536)
            assert data, self.output
            self.output += data.decode()

    def signal(self, number):
        self._process.send_signal(number)

    def stop(self, by):
        """Send a signal; return the exit code and how many seconds it took."""
        started = time.monotonic()
        self._process.send_signal(by)
        rest, _ = self._process.communicate(timeout=40)
        self.output += rest.decode()
        return self._process.returncode, time.monotonic() - started


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_run_stops_both_roles_cleanly_on_a_signal(environment, topics, tables, by):
    with Running(environment, "run") as running:
        running.wait_for("worker_started", "sink_started", "partitions_assigned")
        code, seconds = running.stop(by)
    assert (code, seconds < 20) == (0, True), running.output
    assert "worker_stopped" in running.output
    assert "sink_stopped" in running.output


def test_run_without_tables_says_so_and_goes_on_once_they_are_made(environment, agent_metadata, topics):
    with Running(environment, "run") as running:
        running.wait_for("run `agent-metadata db migrate`", "role_ended")
        assert agent_metadata("db", "migrate").returncode == 0
        running.wait_for("worker_started", "sink_started")
        assert running.stop(signal.SIGTERM)[0] == 0
    assert "Traceback" not in running.output


def test_run_logs_json_and_nothing_else_where_that_is_set(environment, topics, tables):
    with Running(environment, "run") as running:
        running.wait_for("worker_started", "sink_started", "partitions_assigned")
        running.stop(signal.SIGTERM)
    entries = [json.loads(line) for line in running.output.splitlines()]
    assert {"event", "level", "timestamp"} <= set.intersection(*map(set, entries))


@pytest.mark.parametrize("command", ["worker", "sink"])
def test_role_signalled_right_after_its_start_stops_cleanly(environment, topics, tables, command):
    with Running(environment, command) as running:
        running.wait_for(f"{command}_started")
        code, seconds = running.stop(signal.SIGTERM)
    assert (code, seconds < 20) == (0, True), running.output
    assert "Traceback" not in running.output


@pytest.mark.parametrize("command", ["worker", "run"])
def test_second_signal_ends_at_once_and_what_was_read_is_read_again(
    environment, agent_metadata, topics, tables, command
):
    line = {"agent_id": A1, "entries": [{"key": "cpu", "value": "12%"}]}
    with Running({**environment, "AGENT_METADATA_WINDOW_SECONDS": "600"}, command) as running:
        running.wait_for("partitions_assigned")
        assert agent_metadata("produce", stdin=json.dumps(line)).returncode == 0
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT):  # so that it sees both before it has ended
            running.signal(number)
        code, seconds = running.stop(signal.SIGCONT)
    assert code in (128 + signal.SIGTERM, 128 + signal.SIGINT), running.output
    assert seconds < 5
    assert "Traceback" not in running.output
    with Running(environment, "run") as running, Running(environment, "watch", A1) as watching:
        running.wait_for("worker_started", "sink_started")
        watching.wait_for("12%")
        assert running.stop(signal.SIGTERM)[0] == 0


def test_run_carries_a_report_from_stdin_to_a_watcher(environment, agent_metadata, topics, tables):
    with Running(environment, "run") as running, Running(environment, "watch", A1) as watching:
        running.wait_for("worker_started", "sink_started", "partitions_assigned")
        line = {"agent_id": A1, "entries": [{"key": "cpu", "value": "12%"}], "collected_at": "2024-01-01T00:00:00Z"}
        assert agent_metadata("produce", stdin=json.dumps(line)).returncode == 0
        watching.wait_for("\n")
        assert running.stop(signal.SIGTERM)[0] == 0
    change = json.loads(watching.output.splitlines()[0])
    del change["notified_at"]
    assert change == {
        "agent_id": A1,
        "key": "cpu",
        "value": "12%",
        "error": "",
        "collected_at": "2024-01-01T00:00:00+00:00",
        "name": None,
    }


def test_watch_ends_on_ctrl_c_without_a_traceback(environment, tables):
    with Running(environment, "watch") as watching:
        # It prints nothing while nothing changes: once it has printed a change, it is known to listen.
        write_row(environment["DATABASE_URL"])
        watching.wait_for("\n")
        code, seconds = watching.stop(signal.SIGINT)
    assert (code, seconds < 10) == (130, True)
    assert "Traceback" not in watching.output


def test_watch_whose_reader_has_gone_ends_without_a_complaint(environment, tables):
    command = [sys.executable, "-m", "pipeline", "watch"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as watching:
        write_row(environment["DATABASE_URL"], "first")
        assert b"first" in watching.stdout.readline()
        watching.stdout.close()
        write_row(environment["DATABASE_URL"], "second")
        assert watching.wait(60) == 1  # Typer's code for it
        assert watching.stderr.read() == b""


def write_row(database_url, key="k"):
    asyncio.run(_write_row(database_url, key))


async def _write_row(database_url, key):
    connection = await asyncpg.connect(database_url)
    await connection.execute(
        "insert into workspace_agent_metadata (workspace_agent_id, key, display_name) values ($1, $2, 'K')",
        uuid.UUID(A1),
        key,
    )
    (payload,) = encode_agent_id_chunks([uuid.UUID(A1)])
    await connection.execute("select pg_notify($1, $2)", NOTIFY_CHANNEL, payload)
    await connection.close()
