"""What is done to the load, and records that are bad in themselves."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from confluent_kafka import Producer

from tests.chaos.harness import START_SECONDS, Action, Run
from tests.support.deployment import eventually


async def stop_load(run: Run) -> None:
    """Stop reporting, and wait for the last acknowledgement."""
    await asyncio.to_thread(run.load.pause)


async def start_load(run: Run) -> None:
    run.load.start()


async def catch_up(run: Run) -> None:
    """Wait until everything is applied."""
    await eventually("lag is 0", run.is_caught_up, START_SECONDS)


def at_rest(*actions: Action) -> Action:
    """Stop the load, wait until everything is applied, do these, and resume the load."""

    async def act(run: Run) -> None:
        for action in (stop_load, catch_up, *actions, start_load):
            await action(run)

    return act


def produce(role: str, records: Sequence[tuple[bytes, bytes]], partition: int = -1) -> Action:
    """Produce these (key, value) to the topic of a role, and wait for their acknowledgement."""

    async def act(run: Run) -> None:
        settings = run.deployment.settings
        producer = Producer({**settings.client_config(), "partitioner": "murmur2", "linger.ms": 5})
        for key, value in records:
            where = {} if partition < 0 else {"partition": partition}
            producer.produce(settings.topic_names[role], value, key, **where)
            producer.poll(0)
        left = await asyncio.to_thread(producer.flush, START_SECONDS)
        assert left == 0, f"{left} records were not acknowledged"

    return act


def bad_reports(count: int) -> list[tuple[bytes, bytes]]:
    """Records that are not reports, of several kinds."""
    kinds = (b"{", b"\xff\xfe", b'{"agent_id":"","entries":[{"key":"k"}]}', b"[]")
    return [(b"bad %d" % number, kinds[number % len(kinds)]) for number in range(count)]


def bad_batches(count: int) -> list[tuple[bytes, bytes]]:
    """Records that are not batches, of several kinds."""
    kinds = (b"{", b"\xff\xfe", b'{"version":0}')
    return [(b"", kinds[number % len(kinds)]) for number in range(count)]


def report_new_agents(count: int, bad: int) -> Action:
    """Report each of `count` new agents once; `bad` of the values are POISON, see `postgres.refuse_poison`."""

    async def act(run: Run) -> None:
        await stop_load(run)
        await asyncio.to_thread(run.load.report_new_agents, count, bad)
        await start_load(run)

    return act
