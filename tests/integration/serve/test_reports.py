"""POST /reports of `agent-metadata serve`, through a real Kafka to rows in a real Postgres."""

import asyncio
import json
import uuid
from datetime import UTC, datetime

import pytest

from pipeline.core.report import agent_uuid
from pipeline.local import PackagedKafka
from pipeline.local.process import free_port
from tests.support.deployment import Deployment, consume_all, eventually
from tests.support.serving import get, post_reports

pytestmark = pytest.mark.services

TOKEN = "write.only"
NDJSON = "application/x-ndjson"


async def serve(pipeline):
    """Start serve; return its URL once it is ready."""
    await pipeline.ready(pipeline.start("serve"), pipeline.settings.serve_port)
    return f"http://127.0.0.1:{pipeline.settings.serve_port}"


def a_report(agent, at=None, **values):
    entries = [{"key": key, "value": value} for key, value in values.items()]
    return {"agent_id": agent, "entries": entries, **({"collected_at": at.isoformat()} if at else {})}


async def test_reports_become_rows_by_name_and_join_those_of_a_producer(deploy):
    pipeline = await deploy(window_seconds=0.2, serve_port=free_port(), serve_reports_token=TOKEN)
    for role in ("worker", "sink"):
        await pipeline.started(role)
    url = await serve(pipeline)
    first, second = datetime(2026, 1, 2, tzinfo=UTC), datetime(2026, 1, 3, tzinfo=UTC)
    agent = uuid.uuid4()
    with pipeline.producer() as producer:
        producer.add(agent, ["cpu"], ["old"], [""], first)
        producer.add("rack 4/host 17", ["cpu"], ["old"], [""], first)
    lines = [a_report("rack 4/host 17", second, cpu="12%", load=0.5), a_report(str(agent).upper(), second, cpu="13%")]
    body = "\n".join(map(json.dumps, lines)).encode()
    assert (await post_reports(url, body, TOKEN, kind=NDJSON))[:2] == (202, {"reports": 2, "entries": 3})
    host = agent_uuid("rack 4/host 17")
    await pipeline.wait_for(
        {
            (host, "cpu"): ("12%", "", second),
            (host, "load"): ("0.5", "", second),
            (str(agent), "cpu"): ("13%", "", second),
        }
    )
    status, shown, _ = await get(url, "/agents/rack%204%2Fhost%2017/metadata")
    assert (status, shown["agent_id"], shown["name"]) == (200, host, "rack 4/host 17")
    assert {row["key"]: row["value"] for row in shown["metadata"]} == {"cpu": "12%", "load": "0.5"}
    records = consume_all(pipeline.settings, pipeline.settings.events_topic)
    keys = {(record.key(), record.partition()) for record in records}
    assert {key for key, _ in keys} == {str(agent).encode(), b"rack 4/host 17"}
    assert len(keys) == 2  # whoever sent them, an agent's reports are in one partition


async def test_serve_needs_no_kafka_without_the_token_and_none_to_show_its_page_with_it(deploy):
    for settings, status in (({}, 404), ({"serve_reports_token": TOKEN}, 503)):
        pipeline = await deploy(serve_port=free_port(), **settings)
        pipeline.environment["KAFKA_BOOTSTRAP_SERVERS"] = f"127.0.0.1:{free_port()}"
        url = await serve(pipeline)
        assert (await get(url, "/"))[0] == 200
        assert (await post_reports(url, a_report("host-17", cpu="1"), TOKEN))[0] == status


async def test_reports_beyond_what_may_wait_for_kafka_are_told_to_come_later(deploy):
    pipeline = await deploy(serve_port=free_port(), serve_reports_token=TOKEN)
    pipeline.environment["KAFKA_BOOTSTRAP_SERVERS"] = f"127.0.0.1:{free_port()}"
    url = await serve(pipeline)
    body = [a_report(f"host-{number}", k="v") for number in range(10_000)]
    answers = await asyncio.gather(*(post_reports(url, body, TOKEN) for _ in range(12)))
    statuses = [status for status, *_ in answers]
    assert (statuses.count(503), statuses.count(429)) == (10, 2)
    assert {headers["Retry-After"] for *_, headers in answers} == {"1"}
    _, metrics, _ = await get(url, "/metrics")
    assert "agent_metadata_waiting_reports 100000.0" in metrics
    assert (await get(url, "/live"))[0] == 200


@pytest.fixture
async def own_kafka(kafka_jars, database_url, tmp_path):
    """A Kafka that the test may kill, and a pipeline on it."""
    with PackagedKafka(kafka_jars) as kafka:
        settings = {"serve_port": free_port(), "serve_reports_token": TOKEN, "window_seconds": 0.2}
        pipeline = Deployment(kafka.bootstrap_servers, database_url, tmp_path, **settings)
        await pipeline.prepare()
        yield kafka, pipeline
        pipeline.close()


async def test_what_was_answered_202_is_in_the_table_though_kafka_is_killed_under_load(own_kafka):
    kafka, pipeline = own_kafka
    for role in ("worker", "sink"):
        await pipeline.started(role)
    url = await serve(pipeline)
    accepted, statuses = {}, set()
    is_over = asyncio.Event()

    async def agent(name):
        """Report until all is over; send what was not accepted again, as an agent should."""
        number = 0
        while not is_over.is_set():
            at = datetime.now(UTC)
            status, _, headers = await post_reports(url, a_report(name, at, n=number), TOKEN)
            while status != 202:
                statuses.add(status)
                await asyncio.sleep(float(headers["Retry-After"]))
                status, _, headers = await post_reports(url, a_report(name, at, n=number), TOKEN)
            accepted[agent_uuid(name), "n"] = (str(number), "", at)
            number += 1

    async with asyncio.TaskGroup() as agents:
        for number in range(20):
            agents.create_task(agent(f"host-{number}"))
        await eventually("all have reported", lambda: len(accepted) == 20)
        await asyncio.to_thread(kafka.kill)
        await eventually("a 503", lambda: statuses)
        await asyncio.to_thread(kafka.restart)
        before = dict(accepted)
        await eventually("all report again", lambda: all(accepted[pair] != before[pair] for pair in before))
        is_over.set()
    assert statuses == {503}
    await pipeline.wait_for(accepted)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"AGENT_METADATA_EVENTS_FORMAT": "otlp_json"}, "AGENT_METADATA_EVENTS_FORMAT=otlp_json"),
        ({"AGENT_METADATA_MAPPING": '{"id": "host", "entries": "values"}'}, "AGENT_METADATA_MAPPING"),
    ],
)
async def test_reports_are_refused_where_the_worker_reads_another_format(deploy, settings, said):
    pipeline = await deploy(serve_port=free_port(), serve_reports_token=TOKEN)
    pipeline.environment |= settings
    code, _, err = await pipeline.run("serve")
    assert (code, err.count("\n")) == (2, 1)
    assert "POST /reports (AGENT_METADATA_SERVE_REPORTS_TOKEN) produces reports in our own format" in err
    assert said in err
