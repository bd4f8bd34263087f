"""A consumer that is stuck ends its process; an outage, which looks the same from inside, doesn't."""

import asyncio
import os
import signal
import uuid
from datetime import UTC, datetime

import pytest

from pipeline.local import PackagedKafka
from pipeline.local.process import free_port
from tests.chaos.broken import MUTANTS
from tests.support.deployment import DEADLINE_SECONDS, Deployment, ask, eventually

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]  # they wait for things that are slow on purpose

STUCK_SECONDS = 15  # the least that the setting takes

CONSUMER = "the consumer is stuck: of partition "
LOOP = "the event loop has not run for "
# (role, mutant, how its one line begins)
FAULTS = [
    ("worker", "worker_without_records", CONSUMER),
    ("worker", "worker_without_turns", LOOP),
    ("sink", "sink_without_records", CONSUMER),
]


def begins_with(port, path, expected):
    """Tell whether a path answers with a status and a body that begins as expected."""
    status, body = ask(port, path)
    return status == expected[0] and body.startswith(expected[1])


def report(deployment, number=0):
    with deployment.producer() as producer:
        for agent in range(1, 50):
            assert producer.add(uuid.UUID(int=agent), ["k"], [f"{number}"], [""], datetime.now(UTC))
        assert producer.flush(DEADLINE_SECONDS) == 0


@pytest.mark.parametrize(("role", "mutant", "why"), FAULTS, ids=[mutant for _, mutant, _ in FAULTS])
async def test_role_that_is_stuck_ends_with_1_and_one_line(deploy, role, mutant, why):
    assert mutant in MUTANTS
    port = free_port()
    deployment = await deploy(window_seconds=0.1, stuck_seconds=STUCK_SECONDS)
    if role == "sink":
        await deployment.started("worker")
    report(deployment)
    deployment.environment["AGENT_METADATA_METRICS_PORT"] = str(port)
    process = deployment.start(role, module=("tests.chaos.broken", mutant))
    await eventually("/live fails", lambda: begins_with(port, "/live", (503, why)))
    await eventually("it ends", lambda: process.poll() is not None)
    log = deployment.log(process)
    (line,) = [line for line in log.splitlines() if line.startswith("agent-metadata: ")]
    assert line.startswith(f"agent-metadata: {why}")
    assert line.endswith("; exiting to be restarted; nothing is lost")
    assert process.returncode == 1
    assert "Traceback" not in log


async def test_broker_that_is_stopped_is_an_outage_which_worker_and_sink_wait_out(kafka_jars, database_url, tmp_path):
    with PackagedKafka(kafka_jars) as kafka:
        deployment = Deployment(
            kafka.bootstrap_servers, database_url, tmp_path, window_seconds=0.1, stuck_seconds=STUCK_SECONDS
        )
        await deployment.prepare()
        try:
            ports = {"worker": free_port(), "sink": free_port()}
            processes = []
            for role, port in ports.items():
                deployment.environment["AGENT_METADATA_METRICS_PORT"] = str(port)
                processes.append(await deployment.started(role))
            report(deployment, 1)
            await eventually("rows are there", lambda: values_are(deployment, "1"))
            for role, port in ports.items():
                await eventually(f"{role} is ready", lambda p=port: ask(p, "/ready")[0] == 200)
            os.kill(kafka.pid, signal.SIGSTOP)
            try:
                for role, port in ports.items():
                    away = (503, "Kafka has not answered for ")
                    await eventually(f"{role} notices", lambda p=port, a=away: begins_with(p, "/ready", a))
                await asyncio.sleep(STUCK_SECONDS + 10)  # the outage itself: longer than what would count as stuck
                assert [process.poll() for process in processes] == [None, None]
                assert [ask(port, "/live")[0] for port in ports.values()] == [200, 200]
            finally:
                os.kill(kafka.pid, signal.SIGCONT)
            report(deployment, 2)
            # Kafka's clients take up to their request timeout, 40 s, to give up a connection that was silent.
            await eventually("rows are right", lambda: values_are(deployment, "2"), 180)
            for role, port in ports.items():
                await eventually(f"{role} is ready again", lambda p=port: ask(p, "/ready")[0] == 200)
            assert [process.poll() for process in processes] == [None, None]
        finally:
            deployment.close()


async def test_stop_while_kafka_does_not_answer_takes_20_seconds_at_most(kafka_jars, database_url, tmp_path):
    with PackagedKafka(kafka_jars) as kafka:
        deployment = Deployment(kafka.bootstrap_servers, database_url, tmp_path, window_seconds=60)
        await deployment.prepare()
        try:
            processes = [await deployment.started(role) for role in ("worker", "sink")]
            report(deployment)
            os.kill(kafka.pid, signal.SIGSTOP)
            try:
                for process in processes:
                    process.terminate()
                codes = [await asyncio.to_thread(process.wait, 25) for process in processes]
            finally:
                os.kill(kafka.pid, signal.SIGCONT)
            assert set(codes) <= {0, 1}
            assert not any("Traceback" in deployment.log(process) for process in processes)
            for role in ("worker", "sink"):
                await deployment.started(role)
            await eventually("nothing was lost", lambda: values_are(deployment, "0"))
        finally:
            deployment.close()


async def values_are(deployment, value):
    return [row[0] for row in (await deployment.table()).values()] == [value] * 49
