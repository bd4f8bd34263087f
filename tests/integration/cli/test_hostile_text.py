"""Whoever may report or write to a topic chooses texts: no command lets them reach the terminal as they are."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from confluent_kafka import Producer

from pipeline.core.dead_letter import dead_letter_headers
from tests.support.deployment import Deployment, consume_all, eventually

pytestmark = pytest.mark.services

# A window title, red, the other direction, a C1 sequence, a forged line, rich's markup and emoji codes.
HOSTILE = "é\x1b]0;title\x07\x1b[31m\u202e\u2066\u200f\x9b31m\r\nforged [red]:rocket:[/]"
ESCAPED = r"é\x1b]0;title\x07\x1b[31m\u202e\u2066\u200f\x9b31m\r\nforged [red]:rocket:[/]"
KEY = "k\x1b[31m\u202e"
REFUSED = "refused\x1b[31m\u202e"
AGENT = "host\x1b[31m\u202e\nforged [red]"
ESCAPED_AGENT = r"host\x1b[31m\u202e\nforged [red]"


class Pipeline(NamedTuple):
    """A pipeline that has carried hostile text into its table and its dead letters; `live` is another schema."""

    deployment: Deployment
    live: str
    logs: str

    def run(self, *arguments: str, encoding: str = "ascii") -> list[str]:
        """Run a command; return its lines, after checking that a terminal obeys no character of them."""
        done = subprocess.run(
            self.deployment.command(*arguments),
            env={**os.environ, **self.deployment.environment, "PYTHONIOENCODING": encoding, "NO_COLOR": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )
        assert done.returncode in (0, 1)
        lines = (done.stdout + done.stderr).decode(encoding).splitlines()
        assert [line for line in lines if not line.isprintable()] == []
        assert [line for line in lines if line.startswith(("forged", "Traceback"))] == []
        return lines


@pytest.fixture(scope="module")
def pipeline(services, tmp_path_factory) -> Iterator[Pipeline]:
    deployment = Deployment(
        services.bootstrap_servers,
        services.database_url,
        tmp_path_factory.mktemp("hostile"),
        own_schema=True,
        partitions=1,
        log_format="console",
    )
    live = f"live_{deployment.run_id}"
    try:
        yield Pipeline(deployment, live, logs=asyncio.run(prepare(deployment, live)))
    finally:
        deployment.close()
        asyncio.run(drop(deployment, live))


async def prepare(deployment: Deployment, live: str) -> str:
    """Return what worker and sink have logged."""
    await deployment.prepare()
    async with deployment.connection() as connection:
        await connection.execute(f"create schema {live}")
        await connection.execute(f"create table {live}.workspace_agent_metadata (like workspace_agent_metadata)")
        await connection.execute("alter table workspace_agent_metadata add check (error <> 'no')")
    roles = [deployment.start("worker"), deployment.start("sink")]
    send(deployment, deployment.settings.events_topic, report(KEY, HOSTILE, HOSTILE), headers=[])
    send(deployment, deployment.settings.events_topic, report(REFUSED, HOSTILE, "no"), headers=[])
    send(deployment, deployment.settings.events_topic, HOSTILE.encode(), headers=[(HOSTILE, HOSTILE.encode())])
    await eventually("the row is there", deployment.table)
    letters = deployment.settings.dead_letter_topic
    await eventually("two dead letters", lambda: len(consume_all(deployment.settings, letters)) == 2)
    for role in roles:
        deployment.stop(role)
    # Written by another program, which may say of a record what it likes.
    for offset in (1, 99):
        headers = dead_letter_headers(
            topic=deployment.settings.events_topic,
            partition=0,
            offset=offset,
            stage=HOSTILE,  # type: ignore[arg-type]  # no stage of ours
            error_class="E",
            message=HOSTILE,
        )
        send(deployment, letters, HOSTILE.encode(), headers=headers)
    async with deployment.connection() as connection:
        await connection.execute(f"insert into {live}.workspace_agent_metadata select * from workspace_agent_metadata")
        await connection.execute(f"update {live}.workspace_agent_metadata set value = 'x' || value")
    return "".join(map(deployment.log, roles))


async def drop(deployment: Deployment, live: str) -> None:
    with contextlib.suppress(Exception):
        async with deployment.connection() as connection:
            await connection.execute(f"drop schema {live} cascade")
    await deployment.drop()


def report(key: str, value: str, error: str) -> bytes:
    entry = {"key": key, "value": value, "error": error}
    return json.dumps({"agent_id": AGENT, "entries": [entry]}).encode()


def send(deployment: Deployment, topic: str, value: bytes, *, headers: list[tuple[str, bytes]]) -> None:
    producer = Producer(deployment.settings.client_config())
    producer.produce(topic, value, key=HOSTILE.encode(), headers=headers)
    assert producer.flush(30) == 0


def test_sink_logs_the_row_that_is_refused_escaped(pipeline):
    lines = pipeline.logs.splitlines()
    assert [line for line in lines if not line.isprintable()] == []
    assert any("row_rejected" in line and r"refused\x1b[31m\u202e" in line for line in lines)


def test_watch_shows_hostile_rows_escaped_on_a_terminal(pipeline):
    shown = on_a_terminal(pipeline.deployment.command("watch"), pipeline.deployment.environment, until=r"\r\nforged")
    assert r"\x1b]0;title\x07\x1b[31m\u202e\u2066\u200f\x9b31m\r\nforged [red]:rocket:[/]" in shown
    assert ESCAPED_AGENT in shown
    assert KEY not in shown
    hidden = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", "", shown)  # rich's own: colours, the cursor
    assert hidden.isprintable(), ascii(hidden)


def on_a_terminal(command: list[str], environment: dict[str, str], *, until: str) -> str:
    """Run a command on a wide terminal of its own until it has shown a text; return all that it wrote."""
    ours, its = pty.openpty()
    variables = {**os.environ, **environment, "COLUMNS": "400", "LINES": "50", "TERM": "xterm-256color"}
    shown, deadline = b"", time.monotonic() + 60
    with subprocess.Popen(command, env=variables, stdin=its, stdout=its, stderr=its) as process:
        os.close(its)
        while until.encode() not in shown and time.monotonic() < deadline:
            if select.select([ours], [], [], 1)[0]:
                shown += os.read(ours, 65536)
        process.kill()
    os.close(ours)
    return shown.decode()


def test_watch_as_json_is_json_in_ascii(pipeline):
    with pipeline.deployment.start_command("watch") as process:
        line = process.stdout.readline()
        process.kill()
    assert line.rstrip("\n").isprintable()
    change = json.loads(line)
    assert (change["name"], change["value"]) == (AGENT, HOSTILE)


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_why_shows_values_and_the_dead_letter_escaped(pipeline, encoding):
    text = "\n".join(pipeline.run("why", AGENT, REFUSED, encoding=encoding))
    assert f"agent:       {ESCAPED_AGENT}" in text
    assert r"dead_letter:" in text
    assert ESCAPED.replace("é", "é" if encoding == "utf-8" else r"\xe9") in text
    assert r"\x1b]0;title\x07" in "\n".join(pipeline.run("why", AGENT, KEY))


def test_why_of_a_key_that_is_no_text_is_no_traceback(pipeline):
    pipeline.run("why", AGENT, "\udcff")


def test_status_obeys_nothing(pipeline):
    lines = pipeline.run("status", "--stale-after", "0")
    assert "dead letters    4" in lines
    assert any(line.startswith(f"  fell silent   {ESCAPED_AGENT}, ") for line in lines)


def test_dead_letter_list_shows_reason_stage_and_key_escaped(pipeline):
    lines = pipeline.run("dead-letter", "list", encoding="utf-8")
    assert lines[-1] == "4 dead letters"
    assert any(f"  sink  {ESCAPED_AGENT}  " in line for line in lines)
    assert lines[-2].count(ESCAPED) >= 2


def test_dead_letter_show_shows_headers_and_value_escaped(pipeline):
    texts = ["\n".join(pipeline.run("dead-letter", "show", f"0:{offset}", encoding="utf-8")) for offset in range(4)]
    assert sum(f"headers:       {ESCAPED}" in text for text in texts) == 1
    assert sum(f"value:         {ESCAPED}" in text for text in texts) == 3


def test_dead_letter_redrive_names_what_it_skips_escaped(pipeline):
    lines = pipeline.run("dead-letter", "redrive", "--all", "--dry-run")
    assert sum("is skipped" in line for line in lines) >= 2


@pytest.mark.parametrize("command", [("replay", "--from", "1h ago"), ("refill",)], ids=" ".join)
def test_replay_and_refill_log_the_row_that_is_refused_escaped(pipeline, command):
    lines = pipeline.run(*command)
    assert any("row_rejected" in line and r"refused\x1b[31m\u202e" in line for line in lines)


def test_shadow_diff_shows_keys_and_values_escaped(pipeline):
    text = "\n".join(pipeline.run("shadow", "diff", "--live", pipeline.live, "--settle", "0", encoding="utf-8"))
    assert r"'k\x1b[31m\u202e': live 'xé\x1b]0;title\x07" in text


@pytest.mark.parametrize(
    "command",
    [
        ("why", AGENT, KEY),
        ("why", AGENT, REFUSED),
        ("status",),
        ("dead-letter", "list"),
        ("dead-letter", "show", "0:0"),
        ("dead-letter", "redrive", "--all", "--dry-run"),
        ("shadow", "diff", "--live", "LIVE", "--settle", "0"),
    ],
    ids=lambda command: " ".join(part for part in command[:2] if part != AGENT),
)
def test_json_is_valid_and_ascii(pipeline, command):
    arguments = [pipeline.live if part == "LIVE" else part for part in command]
    lines = [line for line in pipeline.run(*arguments, "--json") if line.startswith("{")]
    assert lines
    for line in lines:
        json.loads(line)
