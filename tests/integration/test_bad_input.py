"""Bad input through real processes: its rows or its dead letter, and good records in between are untouched."""

import uuid
from datetime import UTC, datetime

import pytest
from confluent_kafka import Producer

from pipeline.core.report import Entry, Report, agent_uuid, encode_report
from tests.support.bad_input import AGENT, CASES
from tests.support.deployment import consume_all, eventually

pytestmark = pytest.mark.services

T0 = datetime(2024, 1, 1, tzinfo=UTC)


def agent_id(number):
    return str(uuid.uuid5(uuid.NAMESPACE_OID, str(number)))


def agent_of(number, case):
    return agent_id(number) if case.agent == AGENT else agent_uuid(case.agent)


def produce(settings, cases):
    """Produce each case as an agent of its own, and after each a good record of one agent; one partition."""
    # lz4: what is large here repeats itself, and the broker counts compressed bytes.
    config = {"compression.type": "lz4", "message.max.bytes": 50_000_000, "linger.ms": 200}
    # Idempotent: a request sent again, as on a loaded machine, must not shift the offsets.
    producer, refused = Producer({**settings.client_config(), **config, "enable.idempotence": True}), []
    for number, case in enumerate(cases):
        value = case.value and case.value.replace(AGENT.encode(), agent_id(number).encode())
        key = case.record_key.replace(AGENT, agent_id(number))
        timestamp = {} if case.timestamp_ms is None else {"timestamp": case.timestamp_ms}
        good = encode_report(Report(agent_id("good"), [Entry(f"{number}", "v")], T0))
        for raw, more in ((value, timestamp), (good, {})):
            producer.produce(
                settings.events_topic, raw, key, partition=0, on_delivery=lambda error, _: refused.append(error), **more
            )
    assert producer.flush(30) == 0
    assert set(refused) == {None}


@pytest.mark.parametrize("timestamp_type", ["LogAppendTime", "CreateTime"])
async def test_bad_input_becomes_what_design_says_and_the_rest_is_untouched(deploy, timestamp_type):
    config = {"message.timestamp.type": timestamp_type, "message.timestamp.after.max.ms": str(2**63 - 1)}
    deployment = await deploy(topic_configs={"events": config}, partitions=1)
    settings = deployment.settings
    cases = [case for case in CASES if case.timestamp_ms is None or timestamp_type == "CreateTime"]
    started = datetime.now(UTC).replace(microsecond=0)  # the broker counts milliseconds
    produce(settings, cases)
    await deployment.started("worker")
    await deployment.started("sink")
    pairs = {(agent_id("good"), f"{number}") for number in range(len(cases))}
    pairs |= {(agent_of(number, case), key) for number, case in enumerate(cases) for key in case.rows}

    async def all_are_there():
        return (await deployment.table()).keys() >= pairs

    await eventually("all rows are there", all_are_there)
    table = await deployment.table()
    assert table.keys() == pairs
    for number, case in enumerate(cases):
        assert table[agent_id("good"), f"{number}"] == ("v", "", T0)
        for key, (value, error, at) in case.rows.items():
            row = table[agent_of(number, case), key]
            assert row[:2] == (value, error)
            assert row[2] == at or (at is None and started <= row[2] <= datetime.now(UTC))
    expected = {2 * number: case.reason for number, case in enumerate(cases) if case.reason}
    await eventually("dead letters are there", lambda: len(dead_letters(settings)) >= len(expected))
    reasons = {int(header(letter, "offset")): header(letter, "exception.message") for letter in dead_letters(settings)}
    assert reasons.keys() == expected.keys()
    assert [reasons[offset] for offset, reason in expected.items() if reason not in reasons[offset]] == []


def dead_letters(settings):
    return consume_all(settings, settings.dead_letter_topic)


def header(letter, name):
    return dict(letter.headers())[f"__connect.errors.{name}"].decode()
