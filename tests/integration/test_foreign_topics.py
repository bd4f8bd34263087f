"""Topics of other programs become right rows; why and replay read them by the same settings."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from confluent_kafka import Producer

from pipeline.core.report import agent_uuid
from pipeline.formats.mapping import MappingConfig
from tests.support.deployment import consume_all, eventually
from tests.support.foreign import (
    CLOUD_EVENT,
    DEBEZIUM,
    DELETED,
    METRICS,
    METRICS_PROTO,
    OF_CLOUD_EVENT,
    OF_DEBEZIUM,
    T0_MS,
)

pytestmark = pytest.mark.services

T0 = datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)
LATER = {**DEBEZIUM, "source": {**DEBEZIUM["source"], "ts_ms": T0_MS + 1}, "op": "u"}
OTHER_ROW = {**DEBEZIUM, "op": "r", "after": {"id": 7, "status": "idle", "load": None}}
BINARY = [("ce_source", b"/buildings/8/fan"), ("ce_time", b"2026-01-02T03:04:05.678Z")]
HISTOGRAM = '{"count":3,"sum":0.75,"min":0.1}'


def rows(agent, at, **values):
    return {(agent_uuid(agent), key): (value, "", at) for key, value in values.items()}


def as_json(*values):
    return [(None if value is None else json.dumps(value).encode(), []) for value in values]


# By name: settings, (value, headers) of each record, the rows, the number of dead letters, a pair to ask `why` for.
TOPICS = {
    "debezium": (
        {"mapping": MappingConfig(**OF_DEBEZIUM, exclude=["name", "updated_at"])},
        as_json({**LATER, "after": {**LATER["after"], "load": 0.5}}, DEBEZIUM, OTHER_ROW, DELETED, None, {"op": "c"}),
        rows("1004", T0 + timedelta(milliseconds=1), status="running", load="0.5")
        | rows("7", T0, status="idle", load=""),
        1,
        ("1004", "load"),
    ),
    "cloud events": (
        {"mapping": MappingConfig(**OF_CLOUD_EVENT)},
        as_json(CLOUD_EVENT, {**CLOUD_EVENT, "time": "2026-01-02T03:04:04Z", "data": {"pressure": 9}}),
        rows(CLOUD_EVENT["source"], T0, temperature="71.5", pressure="2", burning="true", fault="", valves="[1,2]"),
        0,
        (CLOUD_EVENT["source"], "pressure"),
    ),
    "cloud events in binary mode": (
        {"mapping": MappingConfig(id="header:ce_source", time="header:ce_time", entries=".")},
        [(b'{"rpm": 900}', BINARY), (b'{"rpm": 1e400}', BINARY)],
        rows("/buildings/8/fan", T0, rpm="900"),
        1,
        ("/buildings/8/fan", "rpm"),
    ),
    "otlp_json": ({"events_format": "otlp_json"}, as_json(METRICS), None, 0, ("web-1", "load")),
    "otlp_proto": ({"events_format": "otlp_proto"}, [(METRICS_PROTO, [])], None, 0, ("web-1", "load")),
}


def of_metrics(appended_ms):
    """Return the rows of METRICS: a point without a time has that of its record."""
    appended = datetime.fromtimestamp(appended_ms / 1000, UTC)
    summary = '{"count":7,"sum":1.5,"quantiles":{"1.0":0.0}}'
    timed = {
        (agent_uuid("web-1"), "system.memory.usage{state=used}"): ("9663676416", "", T0.replace(microsecond=678901))
    }
    timeless = {"http.server.request.duration": HISTOGRAM, "go_gc_duration_seconds": summary, "load": ""}
    return timed | rows("web-1", appended, **timeless)


@pytest.mark.parametrize("name", TOPICS)
async def test_topic_of_another_program_becomes_rows_that_why_and_replay_understand(deploy, name):
    settings, records, expected, bad, pair = TOPICS[name]
    pipeline = await deploy(window_seconds=0.2, **settings)
    await pipeline.started("worker")
    await pipeline.started("sink")
    producer = Producer(pipeline.settings.client_config())
    for value, headers in records:
        producer.produce(pipeline.settings.events_topic, value, key=b"one partition", headers=headers)
    producer.flush()
    if expected is None:
        (message,) = consume_all(pipeline.settings, pipeline.settings.events_topic)
        expected = of_metrics(message.timestamp()[1])
    await pipeline.wait_for(expected)
    letters = pipeline.settings.dead_letter_topic
    await eventually("bad records are dead letters", lambda: len(consume_all(pipeline.settings, letters)) == bad)
    code, out, err = await pipeline.run("why", *pair, "--json")
    assert (code, json.loads(out)["verdict"], err) == (0, "held", "")
    async with pipeline.connection() as connection:
        await connection.execute("truncate workspace_agent_metadata")
    code, _, err = await pipeline.run("replay", "--from", "1h ago")
    assert code == 0, err
    await pipeline.wait_for(expected)
