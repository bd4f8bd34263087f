"""A consumer that is stuck ends its process; an outage, which looks alike from inside, doesn't."""

import asyncio
import os
import signal
import sys
import uuid
from contextlib import suppress
from datetime import UTC, datetime

import pytest

from pipeline.local import PackagedKafka
from pipeline.local.process import free_port
from tests.support.deployment import DEADLINE_SECONDS, Deployment, ask, eventually

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]  # they wait for what takes its time on purpose

STUCK_SECONDS = 15  # the least that the setting takes

# The roles' command, with a consumer that hands nothing over, or an event loop that doesn't turn.
WORKER_WITHOUT_RECORDS = """
import asyncio
from pipeline import cli
from pipeline.worker import transport as chunk_transport

async def nothing(*_, **__):
    await asyncio.Event().wait()

chunk_transport.ChunkConsumerThread.getmany = nothing
cli.main()
"""
WORKER_WITHOUT_TURNS = """
import time
from pipeline import cli
from pipeline.worker import worker

worker.Worker._take = lambda *_: time.sleep(3600)
cli.main()
"""
SINK_WITHOUT_RECORDS = """
from pipeline import cli
from pipeline.sink import consumer as batch_consumer

batch_consumer.BatchConsumer._hand_over = lambda *_: None
cli.main()
"""
CONSUMER = "the consumer is stuck: of partition "
LOOP = "the event loop has not turned for "
FAULTS = [
    ("worker", WORKER_WITHOUT_RECORDS, CONSUMER),
    ("worker", WORKER_WITHOUT_TURNS, LOOP),
    ("sink", SINK_WITHOUT_RECORDS, CONSUMER),
]


def beginning(port, path, expected):
    """Tell whether a path answers with a status and a body that begins as expected."""
    status, body = ask(port, path)
    return status == expected[0] and body.startswith(expected[1])


def report(pipeline, number=0):
    with pipeline.producer() as producer:
        for agent in range(1, 50):
            assert producer.add(uuid.UUID(int=agent), ["k"], [f"{number}"], [""], datetime.now(UTC))
        assert producer.flush(DEADLINE_SECONDS) == 0


@pytest.mark.parametrize(("role", "program", "why"), FAULTS, ids=["worker", "worker's event loop", "sink"])
async def test_role_that_is_stuck_ends_with_1_and_one_line(deploy, tmp_path, role, program, why):
    port = free_port()
    pipeline = await deploy(window_seconds=0.1, stuck_seconds=STUCK_SECONDS)
    if role == "sink":
        await pipeline.started("worker")
    report(pipeline)
    environment = {**os.environ, **pipeline.environment, "AGENT_METADATA_METRICS_PORT": str(port)}
    with (tmp_path / "stderr").open("wb") as stderr:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, role, env=environment, stderr=stderr
        )
    try:
        await eventually("/live fails", lambda: beginning(port, "/live", (503, why)))
        code = await asyncio.wait_for(process.wait(), DEADLINE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    said = (tmp_path / "stderr").read_text()
    (line,) = [line for line in said.splitlines() if line.startswith("agent-metadata: ")]
    assert line.startswith(f"agent-metadata: {why}")
    assert line.endswith("; ending to be restarted, nothing is lost")
    assert code == 1
    assert "Traceback" not in said


async def test_broker_that_is_stopped_is_an_outage_which_worker_and_sink_wait_out(kafka_jars, database_url, tmp_path):
    with PackagedKafka(kafka_jars) as kafka:
        pipeline = Deployment(
            kafka.bootstrap_servers, database_url, tmp_path, window_seconds=0.1, stuck_seconds=STUCK_SECONDS
        )
        await pipeline.prepare()
        try:
            ports = {"worker": free_port(), "sink": free_port()}
            processes = []
            for role, port in ports.items():
                pipeline.environment["AGENT_METADATA_METRICS_PORT"] = str(port)
                processes.append(await pipeline.started(role))
            report(pipeline, 1)
            await eventually("rows are there", lambda: values_are(pipeline, "1"))
            for role, port in ports.items():
                await eventually(f"{role} is ready", lambda p=port: ask(p, "/ready")[0] == 200)
            os.kill(kafka.pid, signal.SIGSTOP)
            try:
                for role, port in ports.items():
                    away = (503, "Kafka has not answered for ")
                    await eventually(f"{role} notices", lambda p=port, a=away: beginning(p, "/ready", a))
                await asyncio.sleep(STUCK_SECONDS + 10)  # the outage itself: longer than what would be stuck
                assert [process.poll() for process in processes] == [None, None]
                assert [ask(port, "/live")[0] for port in ports.values()] == [200, 200]
            finally:
                os.kill(kafka.pid, signal.SIGCONT)
            report(pipeline, 2)
            # Kafka's clients take up to their request timeout, 40 s, to give a connection up that was silent.
            await eventually("rows are right", lambda: values_are(pipeline, "2"), 180)
            for role, port in ports.items():
                await eventually(f"{role} is ready again", lambda p=port: ask(p, "/ready")[0] == 200)
            assert [process.poll() for process in processes] == [None, None]
        finally:
            pipeline.close()


async def test_stop_while_kafka_does_not_answer_takes_20_seconds_at_most(kafka_jars, database_url, tmp_path):
    with PackagedKafka(kafka_jars) as kafka:
        pipeline = Deployment(kafka.bootstrap_servers, database_url, tmp_path, window_seconds=60)
        await pipeline.prepare()
        try:
            processes = [await pipeline.started(role) for role in ("worker", "sink")]
            report(pipeline)
            os.kill(kafka.pid, signal.SIGSTOP)
            try:
                for process in processes:
                    process.terminate()
                codes = [await asyncio.to_thread(process.wait, 25) for process in processes]
            finally:
                os.kill(kafka.pid, signal.SIGCONT)
            assert set(codes) <= {0, 1}
            assert not any("Traceback" in pipeline.log(process) for process in processes)
            for role in ("worker", "sink"):
                await pipeline.started(role)
            await eventually("nothing was lost", lambda: values_are(pipeline, "0"))
        finally:
            pipeline.close()


async def values_are(pipeline, value):
    return [row[0] for row in (await pipeline.table()).values()] == [value] * 49
