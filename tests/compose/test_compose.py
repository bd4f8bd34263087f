"""docker-compose.yml on a real engine: what it serves is compared with the demo's oracle."""

import json
import os
import re
import subprocess
import time
import uuid
from datetime import datetime
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from pipeline.local.process import free_port

pytestmark = [pytest.mark.docker, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
ARRIVAL_SECONDS = 60.0
OURS = ("topics", "migrations", "worker", "sink", "serve", "agents")


class Compose:
    def __init__(self):
        self.port = free_port()
        self._environment = {
            **os.environ,
            "COMPOSE_PROJECT_NAME": f"agent-metadata-test-{uuid.uuid4().hex[:8]}",
            "SERVE_PORT": str(self.port),
            "KAFKA_PORT": str(free_port()),
            "POSTGRES_PASSWORD": "not-the-default",
            "SERVE_TOKEN": "",
            "AGENTS": "50",
        }

    def __call__(self, *arguments, seconds=120):
        done = subprocess.run(
            ["docker", "compose", "--ansi=never", *arguments],
            cwd=ROOT,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-1000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def containers(self):
        return [json.loads(line) for line in self("ps", "--all", "--format=json").splitlines()]

    def served(self, agent_ids):
        query = urlencode([("agent", agent_id) for agent_id in agent_ids])
        with urlopen(f"http://127.0.0.1:{self.port}/metadata?{query}", timeout=30) as response:
            agents = json.load(response)["agents"]
        return {
            (agent["agent_id"], row["key"]): (row["value"], row["error"], datetime.fromisoformat(row["collected_at"]))
            for agent in agents
            for row in agent["metadata"]
        }


@pytest.fixture(scope="module")
def compose():
    started = Compose()
    try:
        started("up", "--detach", "--build", "--wait", "--wait-timeout=300", "--scale=worker=4", seconds=800)
        yield started
    finally:
        started("down", "--volumes", "--timeout=20", seconds=180)


def test_all_roles_are_healthy_four_workers_among_them_and_none_is_root(compose):
    states = sorted((item["Service"], item["State"], item["Health"], item["ExitCode"]) for item in compose.containers())
    assert states == [
        ("agents", "running", "", 0),
        ("kafka", "running", "healthy", 0),
        ("migrations", "exited", "", 0),
        ("postgres", "running", "healthy", 0),
        ("serve", "running", "healthy", 0),
        ("sink", "running", "healthy", 0),
        ("topics", "exited", "", 0),
        *[("worker", "running", "healthy", 0)] * 4,
    ]
    assert {compose("exec", "-T", role, "id", "-u").strip() for role in ("worker", "sink", "serve")} == {"10001"}


def test_ports_are_open_to_this_machine_only(compose):
    published = [port for item in compose.containers() for port in item["Publishers"] or () if port["PublishedPort"]]
    assert {port["TargetPort"] for port in published} == {8080, 9092}
    assert {port["URL"] for port in published} == {"127.0.0.1"}


def test_page_is_served(compose):
    with urlopen(f"http://127.0.0.1:{compose.port}/", timeout=30) as response:
        assert "<title>Agent metadata</title>" in response.read().decode()


def test_what_is_served_in_the_end_is_what_the_agents_reported(compose, tmp_path):
    compose("stop", "agents")
    compose("cp", "agents:/tmp/oracle.jsonl", str(tmp_path))
    lines = (tmp_path / "oracle.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [json.loads(line) for line in lines]
    oracle = {(entry[0], entry[1]): (entry[2], entry[3], datetime.fromisoformat(entry[4])) for entry in entries}
    assert len(oracle) == 500
    agent_ids = sorted({agent_id for agent_id, _ in oracle})
    deadline = time.monotonic() + ARRIVAL_SECONDS
    while True:
        try:
            served = compose.served(agent_ids)
        except URLError:
            served = {}
        if served == oracle:
            break
        wrong = {pair: (served.get(pair), want) for pair, want in oracle.items() if served.get(pair) != want}
        assert time.monotonic() < deadline, f"{len(wrong)} rows wrong: {list(wrong.items())[:3]}"
        time.sleep(0.5)


def test_logs_are_free_of_errors(compose):
    lines = compose("logs", "--no-color", *OURS, "postgres").splitlines()
    assert len(lines) > 10
    # Kafka's own log is left out: it reports it as an error when a loaded machine makes it slow.
    assert [line for line in lines if re.search(r"\berror\b|ERROR|FATAL|PANIC|Traceback|Exception", line)] == []
