"""The dead-letter commands, on what worker and sink really put there."""

import asyncio
import json
import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime, timedelta

import pytest

from pipeline.core.dead_letter import REDRIVES_HEADER, dead_letter_headers
from pipeline.core.report import agent_uuid
from pipeline.kafka.publisher import Publisher
from tests.support.deployment import consume_all, eventually

pytestmark = pytest.mark.services

AGENT = uuid.UUID(int=7)
PAIR = (str(AGENT), "status")


async def dead_letter(pipeline, *arguments, exit_code=0):
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "pipeline", "dead-letter", *arguments],
        env={**os.environ, **pipeline.environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == exit_code, done.stderr
    assert "Traceback" not in done.stderr
    return done


async def redrive(pipeline, *arguments):
    done = json.loads((await dead_letter(pipeline, "redrive", *arguments, "--json")).stdout)
    return {name: count for name, count in done.items() if count}


def letters(pipeline, count):
    held = consume_all(pipeline.settings, pipeline.settings.dead_letter_topic)
    return held if len(held) == count else None


def report(pipeline, value, at):
    with pipeline.producer() as producer:
        assert producer.add(AGENT, ["status"], [value], [""], at)


async def forbid(pipeline, condition):
    async with pipeline.connection() as connection:
        await connection.execute(f"alter table workspace_agent_metadata add constraint no_poison check ({condition})")


async def allow(pipeline):
    async with pipeline.connection() as connection:
        await connection.execute("alter table workspace_agent_metadata drop constraint no_poison")


async def test_refused_row_is_redriven_with_its_own_time_once_its_cause_is_gone(deploy):
    pipeline = await deploy()
    await forbid(pipeline, "value <> 'poison'")
    await pipeline.started("worker")
    await pipeline.started("sink")
    at = datetime.now(UTC)
    report(pipeline, "poison", at)
    await eventually("it is a dead letter", lambda: letters(pipeline, 1))

    assert await redrive(pipeline, "--all", "--dry-run") == {"matched": 1, "redriven": 1, "dry_run": True}
    assert await pipeline.table() == {}
    await allow(pipeline)
    assert await redrive(pipeline, "--agent", str(AGENT)) == {"matched": 1, "redriven": 1}
    await pipeline.wait_for({PAIR: ("poison", "", at)})
    sent = consume_all(pipeline.settings, pipeline.settings.events_topic)
    assert [dict(message.headers() or ()).get(REDRIVES_HEADER) for message in sent] == [None, b"1"]


async def test_refused_row_of_an_agent_with_a_name_is_found_by_it_and_keeps_it(deploy):
    pipeline = await deploy()
    await forbid(pipeline, "value <> 'poison'")
    await pipeline.started("worker")
    await pipeline.started("sink")
    at = datetime.now(UTC)
    with pipeline.producer() as producer:
        assert producer.add("host 17", ["status"], ["poison"], [""], at)
    (letter,) = await eventually("it is a dead letter", lambda: letters(pipeline, 1))
    assert letter.key() == b"host 17"
    assert "  host 17  " in (await dead_letter(pipeline, "list")).stdout
    await allow(pipeline)
    assert await redrive(pipeline, "--agent", "host 18") == {}
    assert await redrive(pipeline, "--agent", agent_uuid("host 17").upper()) == {"matched": 1, "redriven": 1}
    await pipeline.wait_for({(agent_uuid("host 17"), "status"): ("poison", "", at)})
    async with pipeline.connection() as connection:
        assert await connection.fetchval("select name from agent_metadata_names") == "host 17"


async def test_redriving_does_not_bring_an_old_value_back_as_new(deploy):
    pipeline = await deploy()
    await pipeline.started("worker")
    await pipeline.started("sink")
    settings, now = pipeline.settings, datetime.now(UTC)
    publisher = Publisher(settings.client_config())
    old_ms = int((now - timedelta(hours=1)).timestamp() * 1000)
    headers = dead_letter_headers(
        topic=settings.events_topic,
        partition=0,
        offset=0,
        timestamp_ms=old_ms,
        stage="worker",
        error_class="DecodeError",
        message="by an older version",
    )
    timeless = b'{"agent_id":"%s","entries":[{"key":"status","value":"old"}]}' % str(AGENT).encode()
    await (await publisher.send(settings.dead_letter_topic, timeless, headers=headers))
    await publisher.close(5)
    report(pipeline, "new", now)
    await pipeline.wait_for({PAIR: ("new", "", now)})

    assert await redrive(pipeline, "--reason", "OLDER version") == {"matched": 1, "redriven": 1}
    report(pipeline, "newer", now + timedelta(seconds=1))  # in the same partition, so behind what was redriven
    await pipeline.wait_for({PAIR: ("newer", "", now + timedelta(seconds=1))})
    batches = b"".join(message.value() for message in consume_all(settings, settings.batches_topic))
    assert b'"old"' in batches
    assert str(old_ms * 1000).encode() in batches


async def test_what_comes_back_again_and_again_is_left_alone(deploy):
    pipeline = await deploy()
    await forbid(pipeline, "value <> 'poison'")
    await pipeline.started("worker")
    await pipeline.started("sink")
    report(pipeline, "poison", datetime.now(UTC))
    await eventually("it is a dead letter", lambda: letters(pipeline, 1))
    for times in (1, 2):
        done = await redrive(pipeline, "--all", "--max-redrives", "2")
        assert done == {"matched": times, "redriven": 1} | ({"duplicates": times - 1} if times > 1 else {})
        await eventually("it came back", lambda times=times: letters(pipeline, times + 1))
    assert await redrive(pipeline, "--all", "--max-redrives", "2") == {"matched": 3, "duplicates": 2, "came_back": 1}


async def test_list_and_show_tell_what_happened_and_redrive_leaves_what_would_be_refused(deploy):
    pipeline = await deploy()
    await pipeline.started("worker")
    publisher = Publisher(pipeline.settings.client_config())
    bad = [b"{", b'{"agent_id":"agent-\x1b[31m7","entries":[]}', b'{"agent_id":"","entries":[]}', None]
    for value in bad:
        await (
            await publisher.send(pipeline.settings.events_topic, value, key=b"k", partition=0, headers=[("h", b"1")])
        )
    await publisher.close(5)
    await eventually("they are dead letters", lambda: letters(pipeline, len(bad)))

    listed = (await dead_letter(pipeline, "list")).stdout
    assert "4 dead letters" in listed
    assert listed.count("  worker  k  ") == 4
    assert "tombstone" in listed
    listed = (await dead_letter(pipeline, "list", "--json", "--reason", "0 characters")).stdout
    (found,) = map(json.loads, listed.splitlines())
    assert found["value"] == bad[2].decode()
    assert found["original_headers"] == {"h": "1"}
    place = f"{found['partition']}:{found['offset']}"
    shown = (await dead_letter(pipeline, "show", place)).stdout
    assert f"{pipeline.settings.events_topic}[0]@2" in shown
    assert "agent_id has 0 characters" in shown
    assert "\x1b" not in (await dead_letter(pipeline, "show", "1")).stdout

    done = await dead_letter(pipeline, "redrive", "--all")
    assert "redriven 0 of 4 dead letters; 4 would be refused again" in done.stdout
    assert f"{place} is skipped: agent_id has 0 characters" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "exit_code", "said"),
    [
        (["redrive"], 2, "say which"),
        (["list", "--stage", "kitchen"], 2, "must be worker or sink"),
        (["show", "zero"], 2, "PARTITION:OFFSET"),
        (["show", "0:99"], 1, "has nothing at 0:99"),
    ],
)
async def test_mistakes_get_one_line(deploy, arguments, exit_code, said):
    pipeline = await deploy()
    done = await dead_letter(pipeline, *arguments, exit_code=exit_code)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


async def test_missing_topic_gets_one_line(deploy):
    pipeline = await deploy()
    pipeline.environment["AGENT_METADATA_DEAD_LETTER_TOPIC"] = f"no-{uuid.uuid4()}"
    done = await dead_letter(pipeline, "list", exit_code=1)
    assert "agent-metadata topics create" in done.stderr
    assert done.stderr.count("\n") == 1
