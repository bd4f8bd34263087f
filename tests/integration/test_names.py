"""Agents that are called by a name, from their report to whatever shows rows."""

import json
import uuid
from datetime import UTC, datetime

import pytest

from pipeline.core.report import agent_uuid
from pipeline.listener import MetadataListener

pytestmark = pytest.mark.services

HOSTILE = "host 17/é\x1b[31m\u202e"
ESCAPED = r"host 17/é\x1b[31m\u202e"
NAMES = [HOSTILE, "host-2", "host-3"]
BY_ID = {agent_uuid(name): name for name in NAMES}
A1 = uuid.UUID(int=1)


async def names(pipeline):
    async with pipeline.connection() as connection:
        rows = await connection.fetch("select agent_id, name from agent_metadata_names")
    return {str(row["agent_id"]): row["name"] for row in rows}


@pytest.fixture
async def pipeline(deploy):
    """A pipeline whose table has an agent of each name, and one by UUID."""
    made = await deploy(window_seconds=0.2)
    await made.started("worker")
    await made.started("sink")
    expected, at = {}, datetime.now(UTC)
    with made.producer() as producer:
        for agent in (*NAMES, A1, str(A1).upper()):
            assert producer.add(agent, ["cpu"], ["12%"], [""], at)
            expected[agent_uuid(str(agent)), "cpu"] = ("12%", "", at)
    await made.wait_for(expected)
    return made


async def said(pipeline, *command):
    code, out, err = await pipeline.run(*command)
    assert code == 0, err
    return out


async def test_name_is_kept_shown_and_understood_everywhere(pipeline):
    assert await names(pipeline) == BY_ID
    url = pipeline.settings.database_url.get_secret_value()
    change = await anext(MetadataListener(url, [HOSTILE]).changes())
    assert (str(change.agent_id), change.name, change.value) == (agent_uuid(HOSTILE), HOSTILE, "12%")
    traced = [
        json.loads(await said(pipeline, "why", agent, "cpu", "--json")) for agent in (HOSTILE, agent_uuid(HOSTILE))
    ]
    assert [(found["name"], found["verdict"], found["agent_id"]) for found in traced] == [
        (HOSTILE, "held", agent_uuid(HOSTILE))
    ] * 2
    assert f"agent:       {ESCAPED}\n" in await said(pipeline, "why", HOSTILE, "cpu")
    stale = json.loads(await said(pipeline, "status", "--stale-after", "0", "--json"))["table"]["latest_stale"]
    assert {agent["agent_id"]: agent["name"] for agent in stale} == {**BY_ID, str(A1): None}
    shown = await said(pipeline, "status", "--stale-after", "0")
    assert ESCAPED in shown
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("command", [("replay", "--from", "1h ago"), ("refill",)], ids=" ".join)
async def test_names_that_were_lost_are_brought_back(pipeline, command):
    async with pipeline.connection() as connection:
        await connection.execute("truncate agent_metadata_names")
    assert json.loads(await said(pipeline, *command, "--json"))["pairs"] == 4
    assert await names(pipeline) == BY_ID


async def test_replay_of_one_agent_is_by_its_name_and_of_its_rows_only(pipeline):
    async with pipeline.connection() as connection:
        await connection.execute("truncate workspace_agent_metadata, agent_metadata_names")
    for source in ("events", "batches"):
        done = await said(pipeline, "replay", "--from", "1h ago", "--source", source, "--agent", "host-2", "--json")
        assert json.loads(done)["pairs"] == 1


async def test_refill_of_an_emptied_table_brings_the_names_with_the_rows(pipeline):
    rows = await pipeline.table()
    async with pipeline.connection() as connection:
        await connection.execute("truncate workspace_agent_metadata, agent_metadata_names")
    await pipeline.wait_for(rows)
    assert await names(pipeline) == BY_ID
