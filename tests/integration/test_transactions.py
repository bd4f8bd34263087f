"""Reports of Kafka transactions, on a real Kafka and a real Postgres: committed ones count, and no others."""

import asyncio
import json
import time
import uuid
from datetime import UTC, datetime

import pytest
from confluent_kafka import Producer

from pipeline.core.report import Entry, Report, encode_report
from pipeline.kafka.admin import KafkaAdmin
from pipeline.local.process import free_port
from tests.support.deployment import ask, eventually
from tests.support.prometheus_rules import families

pytestmark = pytest.mark.services

STUCK_SECONDS = 15  # the least that the setting allows
NAMES = ("aborted", "committed", "plain", "open", "behind")
AGENTS = {name: uuid.uuid5(uuid.NAMESPACE_OID, name) for name in NAMES}


class Reports:
    """Reports of one key, each agent's value its name, all in partition 0 so that their order is known."""

    def __init__(self, pipeline):
        self._pipeline = pipeline
        self.at = datetime.now(UTC)
        self._producers = {}

    def producer(self, transaction=None):
        if transaction not in self._producers:
            ids = {"transactional.id": f"{self._pipeline.run_id}-{transaction}"} if transaction else {}
            producer = Producer({**self._pipeline.settings.client_config(), **ids})
            if transaction:
                producer.init_transactions(30)
            self._producers[transaction] = producer
        return self._producers[transaction]

    def send(self, name, transaction=None):
        value = encode_report(Report(str(AGENTS[name]), [Entry("k", name)], self.at))
        producer = self.producer(transaction)
        producer.produce(self._pipeline.settings.events_topic, value, str(AGENTS[name]), partition=0)
        assert producer.flush(30) == 0

    def rows(self, *names):
        return {(str(AGENTS[name]), "k"): (name, "", self.at) for name in names}

    async def are_ended(self):
        """Tell whether Kafka has written the markers of all transactions, which it does after it has answered."""
        with KafkaAdmin(self._pipeline.settings.client_config()) as admin:
            offsets = await admin.offsets(self._pipeline.settings.events_topic, [0], 10.0)
        return offsets[0].stable == offsets[0].end

    async def send_all_but_the_last_commit(self):
        """Interleave a transaction that is aborted, one that is committed, one that stays open, and reports of none."""
        for name in ("aborted", "committed", "open"):
            self.producer(name).begin_transaction()
        self.send("aborted", "aborted")
        self.send("committed", "committed")
        self.send("plain")
        self.producer("aborted").abort_transaction(30)
        self.producer("committed").commit_transaction(30)
        await eventually("the markers are written", self.are_ended)
        self.send("open", "open")
        self.send("behind")


async def run(pipeline, *arguments):
    """Run a command to its end; return (exit code, what it prints as JSON)."""
    code, out, err = await pipeline.run(*arguments, "--json")
    assert out, err
    return code, json.loads(out)


async def verdicts(pipeline):
    return {name: (await run(pipeline, "why", str(AGENTS[name]), "k"))[1]["verdict"] for name in NAMES}


def sample(port, name):
    """Return the highest value that the partitions show; None while there is none yet."""
    values = [
        sample.value
        for family in families(ask(port, "/metrics")[1])
        for sample in family.samples
        if sample.name == f"agent_metadata_{name}"
    ]
    return max(values, default=None)


async def test_open_transaction_holds_back_what_follows_and_ends_nothing(deploy):
    pipeline = await deploy(stuck_seconds=STUCK_SECONDS, session_timeout_seconds=10)
    roles, ports = [], []
    for role in ("worker", "sink"):
        ports.append(free_port())
        pipeline.environment["AGENT_METADATA_METRICS_PORT"] = str(ports[-1])
        roles.append(await pipeline.started(role))
    reports = Reports(pipeline)
    await reports.send_all_but_the_last_commit()
    await pipeline.wait_for(reports.rows("committed", "plain"))
    await eventually("the metrics say what waits", lambda: sample(ports[0], "uncommitted_records") == 2)
    began = time.monotonic()
    while time.monotonic() - began < 3 * STUCK_SECONDS:  # what is tested is that time passes
        assert [ask(port, "/live") for port in ports] == [(200, "ok\n")] * 2
        await asyncio.sleep(1)
    await eventually("the roles are ready", lambda: all(ask(port, "/ready")[0] == 200 for port in ports))
    assert [role.poll() for role in roles] == [None, None]
    assert await pipeline.table() == reports.rows("committed", "plain")
    assert sample(ports[0], "lag_records") == 0
    assert sample(ports[0], "uncommitted_seconds") > 2 * STUCK_SECONDS
    code, status = await run(pipeline, "status", "--max-lag", "20")
    assert code == 1
    assert status["partitions"][0]["worker_lag"] == 0
    assert status["partitions"][0]["uncommitted"] == 2
    assert ["a transaction in partition 0" in problem for problem in status["problems"]] == [True]
    assert await verdicts(pipeline) == {
        "aborted": "no_event",
        "committed": "held",
        "plain": "held",
        "open": "no_event",
        "behind": "no_event",
    }
    explanation = (await run(pipeline, "why", str(AGENTS["behind"]), "k"))[1]["explanation"]
    assert explanation.endswith("2 more records of the topic wait in or behind an open transaction")
    reports.producer("open").commit_transaction(30)
    await pipeline.wait_for(reports.rows("committed", "plain", "open", "behind"))
    await eventually("nothing waits", lambda: sample(ports[0], "uncommitted_records") == 0)
    assert (await run(pipeline, "status"))[0] == 0
    assert [pipeline.stop(role) for role in roles] == [0, 0]


async def test_replay_writes_what_the_live_pipeline_wrote(deploy):
    pipeline = await deploy()
    reports = Reports(pipeline)
    await reports.send_all_but_the_last_commit()
    code, dry = await run(pipeline, "replay", "--from", "2020-01-01T00:00:00Z", "--dry-run")
    assert (code, dry["pairs"], dry["changed"]) == (0, 2, 2)
    assert (await run(pipeline, "replay", "--from", "2020-01-01T00:00:00Z"))[0] == 0
    assert await pipeline.table() == reports.rows("committed", "plain")
    reports.producer("open").abort_transaction(30)
    for role in ("worker", "sink"):
        await pipeline.started(role)
    await pipeline.wait_for(reports.rows("committed", "plain", "behind"))
    assert (await verdicts(pipeline))["open"] == "no_event"


async def test_worker_commits_the_markers_behind_the_last_report(deploy):
    pipeline = await deploy()
    reports = Reports(pipeline)
    await pipeline.started("worker")
    await pipeline.started("sink")
    reports.producer("committed").begin_transaction()
    reports.send("committed", "committed")
    reports.producer("committed").commit_transaction(30)
    await pipeline.wait_for(reports.rows("committed"))
    reports.producer("aborted").begin_transaction()
    reports.send("aborted", "aborted")
    reports.producer("aborted").abort_transaction(30)

    async def no_lag():
        partitions = (await run(pipeline, "status"))[1]["partitions"]
        return all(item["worker_lag"] == item["sink_lag"] == 0 for item in partitions)

    await eventually("all is committed", no_lag)
