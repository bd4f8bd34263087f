"""Reports in each format, by a real registry, become rows; what can't be read is a dead letter with its reason."""

import json
import struct
import uuid
from datetime import UTC, datetime
from pathlib import Path

import pytest
from confluent_kafka import Producer

from pipeline.core.report import Entry, Report, agent_uuid
from pipeline.errors import ConfigError, PipelineError, ServiceUnavailable
from pipeline.formats.framing import VALUE_SCHEMA_ID_HEADER, frame
from pipeline.formats.registry import SchemaRegistry
from pipeline.formats.reports import write_avro_report, write_protobuf_report
from pipeline.jobs.redrive import LetterFilter, dead_letters
from pipeline.local import PackagedRegistry, registry_folder
from pipeline.producer import MetadataProducer
from tests.conftest import unavailable
from tests.support.deployment import eventually

pytestmark = pytest.mark.services

TOPICS = Path(__file__).parents[2] / "topics"
T0 = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture(scope="module")
def registry():
    try:
        folder = registry_folder(print)
    except PipelineError as error:
        unavailable(str(error), required_by="PIPELINE_REQUIRE_SERVICES")
    with PackagedRegistry(folder) as registry:
        yield registry


async def rows(deployment):
    async with deployment.connection() as connection:
        found = await connection.fetch("select workspace_agent_id, key, value, error from workspace_agent_metadata")
    return {(str(row[0]), row[1]): (row[2], row[3]) for row in found}


@pytest.mark.parametrize("report_format", ["json", "json_schema", "avro", "protobuf"])
async def test_reports_that_the_producer_writes_become_rows(deploy, registry, report_format):
    deployment = await deploy(window_seconds=0.2, log_format="json", schema_registry_url=registry.url)
    settings = deployment.settings
    await deployment.started("worker")
    await deployment.started("sink")
    agent = uuid.uuid4()
    with MetadataProducer(
        settings.client_config(),
        topic=settings.events_topic,
        format=report_format,
        schema_registry=settings.registry_config(),
    ) as producer:
        assert producer.add(agent, ["cpu", "ü\\"], ["12%", "€" * 900], ["", "timed out"], T0)
        assert producer.add("host-17", ["cpu"], ["7%"], [""], T0)
    expected = {
        (str(agent), "cpu"): ("12%", ""),
        (str(agent), "ü\\"): ("€" * 682, "value of 2700 bytes exceeded 2048 bytes"),
        (agent_uuid("host-17"), "cpu"): ("7%", ""),
    }

    async def written():
        return await rows(deployment) == expected

    await eventually("every row is right", written, 30)


def test_producer_that_can_not_register_its_schema_says_why(registry):
    config = {"bootstrap.servers": "127.0.0.1:1", "log_level": 0}
    topic = f"t-{uuid.uuid4()}"
    with pytest.raises(ConfigError, match="need a schema registry"):
        MetadataProducer(config, topic=topic, format="avro")
    with pytest.raises(ConfigError, match="is not a format of reports"):
        MetadataProducer(config, topic=topic, format="xml")
    with pytest.raises(ServiceUnavailable, match="does not answer"):
        MetadataProducer(config, topic=topic, format="avro", schema_registry={"url": "http://127.0.0.1:1"})
    looking = {"url": registry.url, "auto.register.schemas": False}
    with pytest.raises(ConfigError, match="not registered under the subject"):
        MetadataProducer(config, topic=topic, format="avro", schema_registry=looking)
    MetadataProducer(config, topic=topic, format="avro", schema_registry={"url": registry.url}).close(0)
    MetadataProducer(config, topic=topic, format="avro", schema_registry=looking).close(0)


@pytest.fixture
def registered(registry):
    """Return a function that registers a schema under a subject of its own and returns its id."""
    with SchemaRegistry({"url": registry.url}) as client:
        yield lambda kind, text: client.register(f"{uuid.uuid4()}-value", kind, text)


async def test_foreign_schemas_and_headers_are_read_and_unknown_ids_are_dead_letters(deploy, registry, registered):
    deployment = await deploy(window_seconds=0.2, log_format="json", schema_registry_url=registry.url)
    settings = deployment.settings
    entry = {
        "type": "record",
        "name": "E",
        "fields": [{"name": "value", "type": "float"}, {"name": "key", "type": "string"}],
    }
    entries = {"name": "entries", "type": {"type": "array", "items": entry}}
    agent_id = {"name": "agent_id", "type": "string"}
    foreign = registered("AVRO", json.dumps({"type": "record", "name": "R", "fields": [entries, agent_id]}))
    recursive = registered(
        "AVRO", '{"type": "record", "name": "L", "fields": [{"name": "next", "type": ["null", "L"]}]}'
    )
    own_avro = registered("AVRO", (TOPICS / "report.avsc").read_text())
    own_protobuf = registered("PROTOBUF", (TOPICS / "report.proto").read_text())
    one, two, three = (str(uuid.UUID(int=number)) for number in (1, 2, 3))
    reading = b"\2" + struct.pack("<f", 21.7) + b"\x08temp\0" + b"\x48" + one.encode()
    report = Report(two, [Entry("cpu", "12%")], T0)
    in_header = own_protobuf.to_bytes(5, "big") + b"\0"
    values = [
        (frame(foreign, reading), []),
        (frame(own_avro, write_avro_report(report)), []),
        (write_protobuf_report(Report(three, report.entries, T0)), [(VALUE_SCHEMA_ID_HEADER, in_header)]),
        (frame(own_avro, b"\xff" * 9), []),
        (frame(2**31 - 1, b"{}"), []),
        (frame(recursive, b"\2" * 100_000), []),
    ]
    producer = Producer(settings.client_config())
    for value, headers in values:
        producer.produce(settings.events_topic, value, "key", headers=headers)
    assert producer.flush(30) == 0
    await deployment.started("worker")
    await deployment.started("sink")

    async def written():
        return await rows(deployment) == {
            (one, "temp"): ("21.7", ""),
            (two, "cpu"): ("12%", ""),
            (three, "cpu"): ("12%", ""),
        }

    await eventually("what can be read is in the table", written, 30)
    letters = await eventually("the rest are dead letters", lambda: refused(settings), 30)
    assert [reason.partition(":")[0] for reason in letters] == [
        "not what its Avro schema describes",
        "the schema registry has no schema 2147483647 (HTTP 404",
        f"schema {recursive}",
    ]


def refused(settings):
    """Return the reasons of three dead letters, or nothing while there are fewer."""
    letters = sorted(dead_letters(settings, LetterFilter()), key=lambda letter: int(letter.failure_headers["offset"]))
    return [letter.failure_headers["exception.message"] for letter in letters] if len(letters) == 3 else []
