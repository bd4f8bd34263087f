"""Kafka with ACLs: the rights that docs/settings.md lists suffice, and an error names the one that is missing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import aiohttp
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
)

from pipeline.errors import PipelineError
from pipeline.kafka.publisher import Publisher
from pipeline.local.process import free_port
from tests.support.deployment import Deployment, consume_all, eventually
from tests.support.documentation import table_rows
from tests.support.secured_kafka import PASSWORD, USER, SecuredKafka, secured_kafka
from tests.support.serving import post_reports

pytestmark = pytest.mark.services

AGENT = UUID("0b7c1e1c-3a54-4be5-9f0e-2a8f7b1ac002")
ROLES = ("events", "batches", "dead-letter")
SERVE = "`serve`, for `POST /reports`"
PRODUCE = ("produce", "--agents", "3", "--duration", "2")
# How the commands end if their rights suffice; status and why find problems here, as nothing runs.
COMMANDS = {
    "`produce`, `bridge`, your producers": (PRODUCE, 0),
    "`status`": (("status",), 1),
    "`why`": (("why", str(AGENT), "cpu"), 1),
    "`replay`": (("replay", "--from", "1h ago"), 0),
    "`refill`": (("refill",), 0),
    "`dead-letter list`, `show`": (("dead-letter", "list"), 0),
    "`dead-letter redrive`": (("dead-letter", "redrive", "--all"), 0),
    "`topics create`": (("topics", "create"), 0),
    "`topics diff`": (("topics", "diff"), 0),
}


@pytest.fixture(scope="module")
def kafka(kafka_jars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    with secured_kafka(kafka_jars, tmp_path_factory.mktemp("rights"), has_acls=True) as secured:
        yield secured


class Two:
    """The same pipeline twice: as a user who may do everything, and as USER, who may do nothing yet."""

    def __init__(self, kafka: SecuredKafka, database_url: str, logs: Path) -> None:
        self.admin = Deployment(kafka.node.bootstrap_servers, database_url, logs)
        names = ("events_topic", "batches_topic", "dead_letter_topic", "consumer_group")
        self.user = Deployment(
            kafka.node.address("SASL"),
            database_url,
            logs,
            kafka_security_protocol="SASL_PLAINTEXT",
            kafka_sasl_mechanism="SCRAM-SHA-512",
            kafka_sasl_username=USER,
            kafka_sasl_password=PASSWORD,
            **{name: getattr(self.admin.settings, name) for name in names},
        )

    def grant(self, topics: str, groups: str = "") -> None:
        """Grant what a row of the table says: names of topics and groups, each with an operation in capitals."""
        acls = []
        for role, operation in re.findall(rf"({'|'.join(ROLES)}) ([A-Z_]+)", topics):
            acls.append((ResourceType.TOPIC, self.admin.settings.topic_names[role.replace("-", "_")], operation))
        if "DESCRIBE of each" in topics:
            acls += [(ResourceType.TOPIC, name, "DESCRIBE") for name in self.admin.settings.topic_names.values()]
        for role, operation in re.findall(r"(worker|sink) ([A-Z_]+)", groups):
            acls.append((ResourceType.GROUP, getattr(self.admin.settings, f"{role}_group"), operation))
        client = AdminClient(self.admin.settings.client_config())
        bindings = [
            AclBinding(
                kind,
                name,
                ResourcePatternType.LITERAL,
                f"User:{USER}",
                "*",
                AclOperation[operation],
                AclPermissionType.ALLOW,
            )
            for kind, name, operation in acls
        ]
        if bindings:
            for future in client.create_acls(bindings).values():
                future.result(30)

    def produce(self) -> dict[tuple[str, str], tuple[str, str, datetime]]:
        """Produce a report, and a record that can't be read to each topic; return what the table must hold."""
        now = datetime.now(UTC)
        with self.admin.producer() as producer:
            producer.add(AGENT, ["cpu"], ["12%"], [""], now)
        raw = Producer(self.admin.settings.client_config())
        for name in self.admin.settings.topic_names.values():
            raw.produce(name, b"{")
        assert raw.flush(30) == 0
        return {(str(AGENT), "cpu"): ("12%", "", now)}

    async def run(self, command: tuple[str, ...]) -> tuple[int, str]:
        """Run a command as USER; return its exit code and stderr."""
        code, _, err = await self.user.run(*command)
        return code, err


@pytest.fixture
def two(kafka: SecuredKafka, database_url: str, tmp_path: Path) -> Iterator[Two]:
    both = Two(kafka, database_url, tmp_path)
    yield both
    both.admin.close()
    both.user.close()


DOCUMENTED = {who: (topics, groups) for who, topics, groups in table_rows("docs/settings.md", "Rights in Kafka")}


def test_table_names_every_command_that_reaches_kafka():
    assert DOCUMENTED.keys() == COMMANDS.keys() | {"`worker`", "`sink`", SERVE}


async def test_serve_takes_reports_with_the_documented_rights_and_ends_without_them(two):
    await two.admin.prepare()
    two.user.environment |= {"AGENT_METADATA_SERVE_PORT": str(port := free_port())}
    two.user.environment |= {"AGENT_METADATA_SERVE_REPORTS_TOKEN": "token"}
    posting = (f"http://127.0.0.1:{port}", {"agent_id": str(AGENT), "entries": [{"key": "cpu"}]}, "token")
    two.grant("events DESCRIBE")
    refused = two.user.start("serve")
    await two.user.ready(refused, port)
    await eventually("it ends", lambda: ends_after(refused, posting))
    assert refused.returncode == 1
    assert "Kafka refuses this producer for good" in two.user.log(refused).splitlines()[-1]
    two.grant(*DOCUMENTED[SERVE])
    await two.user.ready(two.user.start("serve"), port)
    assert (await post_reports(*posting))[0] == 202


async def ends_after(process, posting):
    with suppress(aiohttp.ClientError):
        assert (await post_reports(*posting))[0] == 503
    return process.poll() is not None


@pytest.mark.parametrize("role", ["worker", "sink"])
async def test_role_runs_with_the_documented_rights(two, role):
    await two.admin.prepare()
    two.grant(*DOCUMENTED[f"`{role}`"])
    own = await two.user.started(role)
    await two.admin.started("sink" if role == "worker" else "worker")
    await two.admin.wait_for(two.produce())
    name = two.admin.settings.dead_letter_topic
    await eventually("three dead letters", lambda: len(consume_all(two.admin.settings, name)) == 3)
    assert two.user.stop(own) == 0


@pytest.mark.parametrize("who", COMMANDS)
async def test_command_runs_with_the_documented_rights(two, who):
    command, code = COMMANDS[who]
    if who != "`topics create`":
        await two.admin.prepare()
        two.produce()
    two.grant(*DOCUMENTED[who])
    ended, err = await two.run(command)
    assert ended == code, err
    assert "agent-metadata:" not in err


ALL_SEEN = "events DESCRIBE, batches DESCRIBE, dead-letter DESCRIBE"
LACKING = {
    "worker, its group": (("worker",), f"{ALL_SEEN}, events READ", "", "needs READ on topic {events} and on group"),
    "worker, events": (("worker",), ALL_SEEN, "worker READ", "needs READ on topic {events} and on group"),
    "worker, batches": (
        ("worker",),
        f"{ALL_SEEN}, events READ, dead-letter WRITE",
        "worker READ",
        "refused a record for {batches}: ",
    ),
    "worker, all it writes": (("worker",), f"{ALL_SEEN}, events READ", "worker READ", "Kafka refuse"),
    "produce, events": (PRODUCE, "events DESCRIBE, batches WRITE", "", "refuses reports for {events}: "),
    "produce, all it writes": (PRODUCE, "events DESCRIBE", "", "refuses reports for {events}: "),
    "sink, its group": (("sink",), f"{ALL_SEEN}, batches READ", "", "needs READ on topic {batches} and on group"),
    "sink, batches": (("sink",), ALL_SEEN, "sink READ", "needs READ on topic {batches} and on group"),
    "sink, sight of a topic": (("sink",), "batches READ, dead-letter WRITE", "sink READ", "lacks {events}, or hides"),
    "replay, events": (("replay", "--from", "1h ago"), ALL_SEEN, "", "refused to let us read {events}: "),
    "why, events": (("why", str(AGENT), "cpu"), ALL_SEEN, "", "refused to let us read {events}: "),
    "status, a group": (("status",), "events READ, batches READ, dead-letter READ", "", "Group authorization failed"),
    "list, dead letters": (("dead-letter", "list"), ALL_SEEN, "", "refused to let us read {dead_letter}: "),
    "create, a topic": (("topics", "create"), "", "", "refused to create {batches}: "),
}


@pytest.mark.parametrize(("command", "topics", "groups", "words"), LACKING.values(), ids=LACKING)
async def test_missing_right_ends_the_process_at_once_with_a_line_that_names_it(two, command, topics, groups, words):
    if command != ("topics", "create"):
        await two.admin.prepare()
        two.produce()
    two.grant(topics, groups)
    code, err = await two.run(command)
    assert code in (1, 2)
    assert words.format(**two.admin.settings.topic_names) in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("agent-metadata: ")
    assert "Traceback" not in err, err


async def test_publisher_that_is_refused_for_good_fails_what_waits_and_what_comes_later(two):
    await two.admin.prepare()
    two.grant("events DESCRIBE")
    publisher = Publisher(two.user.settings.client_config())
    for _ in range(2):
        with pytest.raises(PipelineError, match="Kafka refuse"):
            await asyncio.wait_for(await publisher.send(two.user.settings.events_topic, b"{}"), 30)
    assert await publisher.close(5) == 0
