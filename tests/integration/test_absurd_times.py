"""Times outside the years 1 to 9999: of batches that no worker of ours made, and of rows that another program wrote."""

import json
import uuid
from datetime import UTC, datetime

import pytest
from confluent_kafka import Producer

from pipeline.core.batch import Row
from pipeline.core.report import MAX_TIMESTAMP_US, MIN_TIMESTAMP_US, timestamp_us
from pipeline.kafka.topics import require_topics
from pipeline.local.process import free_port
from tests.support.batches import a_batch, produce_batches
from tests.support.deployment import ask, consume_all, eventually

pytestmark = pytest.mark.services

T0 = datetime(2024, 1, 1, tzinfo=UTC)
T0_US = timestamp_us(T0)
FIRST = datetime.min.replace(tzinfo=UTC)
LAST = datetime.max.replace(tzinfo=UTC)
AGENT = str(uuid.UUID(int=1))
ABSURD_US = {
    "year 10000": MAX_TIMESTAMP_US + 1,
    "year 0": MIN_TIMESTAMP_US - 1,
    "beyond Postgres": 2**63 - 1,
    "before Postgres": -(2**63),
    "beyond bigint": 2**63,
    "beyond a float": 10**400,
}
ABSURD_SQL = {"infinity": LAST, "-infinity": FIRST, "20000-01-01 00:00:00+00": LAST, "4000-01-01 00:00:00+00 BC": FIRST}


def row(key, us=T0_US, value="v"):
    return Row(AGENT, key, value, "", us)


async def test_row_whose_time_is_absurd_is_a_dead_letter_and_nothing_else_is_lost(deploy):
    pipeline = await deploy(partitions=1)
    settings = pipeline.settings
    rows = [row("good"), *(row(key, us) for key, us in ABSURD_US.items()), row("good too")]
    window = {"start_us": -(10**30), "end_us": 10**30}
    only_absurd = a_batch(row("alone", MAX_TIMESTAMP_US + 1), first=1)
    produce_batches(settings, a_batch(*rows, first=0, window=window), only_absurd, a_batch(row("later"), first=2))
    sink = await pipeline.started("sink")
    expected = {(AGENT, key): ("v", "", T0) for key in ("good", "good too", "later")}
    await pipeline.wait_for(expected)
    letters = [dict(letter.headers()) for letter in consume_all(settings, settings.dead_letter_topic)]
    reasons = [letter["__connect.errors.exception.message"].decode() for letter in letters]
    absurd = [*ABSURD_US.values(), MAX_TIMESTAMP_US + 1]
    assert reasons == [f"a time outside the years 1 to 9999: collected_at_us is {us}" for us in absurd]
    assert [letter["__connect.errors.offset"] for letter in letters] == [b"0"] * len(ABSURD_US) + [b"1"]
    assert pipeline.stop(sink) == 0
    assert "Traceback" not in pipeline.log(sink)

    code, out, err = await pipeline.run("dead-letter", "list", "--agent", AGENT)
    assert (code, err, out.count("outside the years 1 to 9999")) == (0, "", len(absurd))
    code, out, err = await pipeline.run("dead-letter", "redrive", "--all", "--dry-run", "--json")
    assert (code, json.loads(out)["refused"]) == (0, len(absurd))
    assert "Traceback" not in err

    async with pipeline.connection() as connection:
        await connection.execute("truncate workspace_agent_metadata")
    code, out, err = await pipeline.run("replay", "--source", "batches", "--from", "1h ago", "--dry-run", "--json")
    assert (code, json.loads(out)["dead"], json.loads(out)["changed"]) == (0, len(absurd), 3)
    code, out, err = await pipeline.run("refill")
    assert (code, await pipeline.table()) == (0, expected)


async def test_why_follows_a_pair_through_absurd_times(deploy):
    pipeline = await deploy(partitions=1)
    settings = pipeline.settings
    with pipeline.producer() as producer:
        assert producer.add(uuid.UUID(AGENT), ["k"], ["v"], [""], T0)
    topic_id = (await require_topics(settings.client_config(), pipeline.topics))["events"].topic_id
    absurd = a_batch(row("other", 10**20), first=0, topic_id=topic_id, parts=2)
    window = {"start_us": 0, "end_us": 10**30}
    produce_batches(settings, absurd, a_batch(row("k"), first=0, topic_id=topic_id, window=window, part=2, parts=2))
    await pipeline.started("sink")
    await pipeline.wait_for({(AGENT, "k"): ("v", "", T0)})
    async with pipeline.connection() as connection:
        for stored, shown in ABSURD_SQL.items():
            await connection.execute("update workspace_agent_metadata set collected_at = $1::text::timestamptz", stored)
            _, out, err = await pipeline.run("why", AGENT, "k", "--json")
            found = json.loads(out)
            assert (err, found["verdict"]) == ("", "row_newer" if shown == LAST else "row_older")
            assert datetime.fromisoformat(found["row"]["collected_at"]) == shown
            assert datetime.fromisoformat(found["batch"]["closed_at"]) == LAST


async def test_why_shows_a_record_whose_timestamp_is_absurd(deploy):
    created = {"message.timestamp.type": "CreateTime", "message.timestamp.after.max.ms": str(2**63 - 1)}
    pipeline = await deploy(partitions=1, topic_configs={"events": created})
    producer = Producer(pipeline.settings.client_config())
    value = json.dumps({"agent_id": AGENT, "entries": [{"key": "k"}]}).encode()
    producer.produce(pipeline.settings.events_topic, value, timestamp=MAX_TIMESTAMP_US // 1000 + 1)
    assert producer.flush(10) == 0
    _, out, err = await pipeline.run("why", AGENT, "k", "--json")
    assert (err, json.loads(out)["verdict"]) == ("", "unreadable")


async def test_listeners_serve_and_jobs_go_on_with_rows_whose_time_is_absurd(deploy):
    port = free_port()
    pipeline = await deploy(partitions=1, serve_port=port)
    produce_batches(pipeline.settings, a_batch(row("other"), *(row(stored) for stored in ABSURD_SQL), first=0))
    await pipeline.started("sink")
    await pipeline.wait_for({(AGENT, key): ("v", "", T0) for key in ("other", *ABSURD_SQL)})
    serve, watch = pipeline.start("serve"), pipeline.start("watch", "--json")
    await pipeline.ready(serve, port)
    async with pipeline.connection() as connection:
        change = "update workspace_agent_metadata set collected_at = key::timestamptz where key <> 'other'"
        await connection.execute(change)
    produce_batches(pipeline.settings, a_batch(row("other", value="w"), first=1))  # its NOTIFY names the agent
    expected = {"other": ("w", T0), **{stored: ("v", at) for stored, at in ABSURD_SQL.items()}}

    def shown(listener):
        return contents(map(json.loads, listener.output_path.read_text().splitlines()))

    def served():
        status, body = ask(port, f"/agents/{AGENT}/metadata")
        assert status == 200
        return contents(json.loads(body)["metadata"])

    await eventually("watch shows them", lambda: shown(watch) == expected)
    await eventually("serve shows them", lambda: served() == expected)
    assert ask(port, "/metrics")[0] == 200
    later = pipeline.start("watch", "--json")
    await eventually("a snapshot shows them", lambda: shown(later) == expected)
    code, out, err = await pipeline.run("status", "--json")
    assert (err, json.loads(out)["table"]["rows"]) == ("", 5)
    code, out, err = await pipeline.run("replay", "--source", "batches", "--from", "1h ago", "--json")
    assert (code, json.loads(out)["changed"]) == (0, 2)  # those that were too old
    assert [process.poll() for process in (watch, later)] == [None, None]
    assert pipeline.stop(serve) == 0
    assert not any("Traceback" in pipeline.log(process) for process in (serve, watch, later))


def contents(rows):
    return {item["key"]: (item["value"], datetime.fromisoformat(item["collected_at"])) for item in rows}


async def test_shadow_diff_goes_on_with_rows_whose_time_is_absurd(deploy):
    pipeline = await deploy(partitions=1, own_schema=True)
    async with pipeline.connection() as connection:
        await connection.execute("create table public.workspace_agent_metadata (like workspace_agent_metadata)")
        for table in ("public.workspace_agent_metadata", "workspace_agent_metadata"):
            values = "select $1, '', key, '', $2, '', 0, 0, key::timestamptz, 0 from unnest($3::text[]) key"
            await connection.execute(f"insert into {table} {values}", uuid.UUID(AGENT), table, list(ABSURD_SQL))
    code, out, err = await pipeline.run("shadow", "diff", "--live", "public", "--json")
    # Two count as never reported, and two as just changed.
    assert (code, err, json.loads(out)["unsettled"], json.loads(out)["different"]) == (0, "", 2, 0)
