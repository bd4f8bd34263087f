"""Services that are found or started answer, keep their data through a crash, and end with their owner."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import asyncpg
import pytest
from confluent_kafka import TIMESTAMP_LOG_APPEND_TIME, Consumer, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from pipeline.errors import ConfigError, ServiceUnavailable
from pipeline.local import MockBroker, PackagedKafka, PackagedPostgres, start_services
from pipeline.local.process import remove_orphans

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def kafka(kafka_jars: list[Path]) -> Iterator[PackagedKafka]:
    with PackagedKafka(kafka_jars) as node:
        yield node


def create_topic(servers: str, topic: str) -> None:
    declared = NewTopic(topic, 1, config={"message.timestamp.type": "LogAppendTime"})
    admin = AdminClient({"bootstrap.servers": servers})  # named, because it must outlive the wait
    admin.create_topics([declared])[topic].result(30)


def produce(servers: str, topic: str, value: bytes) -> None:
    acked: list[Message] = []
    producer = Producer({"bootstrap.servers": servers, "enable.idempotence": True})
    producer.produce(topic, value, partition=0, timestamp=1, on_delivery=lambda error, record: acked.append(record))
    assert producer.flush(30) == 0
    assert [record.error() for record in acked] == [None]


def first_record(servers: str, topic: str) -> Message:
    consumer = Consumer({"bootstrap.servers": servers, "group.id": topic, "auto.offset.reset": "earliest"})
    try:
        consumer.assign([TopicPartition(topic, 0, 0)])
        record = consumer.poll(30)
        assert record is not None
        assert record.error() is None
        return record
    finally:
        consumer.close()


def test_packaged_kafka_log_append_time_topic_stamps_the_record(kafka: PackagedKafka) -> None:
    create_topic(kafka.bootstrap_servers, "stamped")
    produce(kafka.bootstrap_servers, "stamped", b"hello")

    record = first_record(kafka.bootstrap_servers, "stamped")

    assert record.value() == b"hello"
    kind, milliseconds = record.timestamp()
    assert kind == TIMESTAMP_LOG_APPEND_TIME
    assert abs(milliseconds / 1000 - time.time()) < 60


def test_packaged_kafka_killed_and_restarted_keeps_acked_records(kafka: PackagedKafka) -> None:
    create_topic(kafka.bootstrap_servers, "survivor")
    produce(kafka.bootstrap_servers, "survivor", b"before the crash")
    address, pid = kafka.bootstrap_servers, kafka.pid

    kafka.kill()
    kafka.restart()

    assert kafka.bootstrap_servers == address
    assert kafka.pid != pid
    assert first_record(address, "survivor").value() == b"before the crash"


def test_packaged_kafka_restarted_by_a_thread_outlives_that_thread(kafka: PackagedKafka) -> None:
    with ThreadPoolExecutor(max_workers=1) as thread:
        thread.submit(kafka.restart).result()

    assert AdminClient({"bootstrap.servers": kafka.bootstrap_servers}).list_topics(timeout=30).brokers


def test_packaged_kafka_unpacks_its_libraries_into_its_own_folder(kafka: PackagedKafka) -> None:
    command = Path(f"/proc/{kafka.pid}/cmdline").read_bytes().split(b"\0")
    assert f"-Djava.io.tmpdir={kafka.log_path.parent}".encode() in command


def test_packaged_kafka_wrong_setting_says_what_kafka_said(kafka_jars: list[Path]) -> None:
    with pytest.raises(ServiceUnavailable, match=r"Invalid value many for configuration num\.partitions"):
        PackagedKafka(kafka_jars, settings={"num.partitions": "many"}).__enter__()


@pytest.mark.parametrize("durable", [True, False])
async def test_packaged_postgres_killed_and_restarted_keeps_committed_rows(durable: bool) -> None:
    with PackagedPostgres(durable=durable) as server:
        before = await asyncpg.connect(server.database_url)
        await before.execute("create table kept as select 1 as n")

        server.kill()
        server.restart()

        before.terminate()
        after = await asyncpg.connect(server.database_url)
        assert await after.fetchval("select n from kept") == 1
        assert await after.fetchval("show fsync") == ("on" if durable else "off")
        await after.close()


def test_packaged_postgres_closed_leaves_no_folder() -> None:
    with PackagedPostgres(durable=False) as server:
        folder = server.log_path.parent
        assert folder.exists()

    assert not folder.exists()


def test_embedded_broker_hands_on_a_record() -> None:
    with MockBroker() as broker:
        produce(broker.bootstrap_servers, "tried", b"hello")

        assert first_record(broker.bootstrap_servers, "tried").value() == b"hello"


async def test_services_answer_inside_an_event_loop() -> None:
    with start_services("packages", say=print, kafka=False) as found:
        connection = await asyncpg.connect(found.database_url)
        assert await connection.fetchval("select 1") == 1
        version = await connection.fetchval("show server_version")
        await connection.close()

        assert found.database == f"PostgreSQL {version} from packages"
        assert found.broker == "not started"


async def test_database_url_is_a_fresh_database(database_url: str) -> None:
    connection = await asyncpg.connect(database_url)

    assert await connection.fetchval("select count(*) from pg_stat_user_tables") == 0
    assert "fresh_database" in await connection.fetchval("select current_database()")

    await connection.close()


def test_env_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_BOOTSTRAP_SERVERS", raising=False)

    with pytest.raises(ConfigError, match="KAFKA_BOOTSTRAP_SERVERS is not set"):
        start_services("env", say=print, postgres=False)


def test_env_postgres_is_described_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    with PackagedPostgres(durable=False) as server:
        monkeypatch.setenv("DATABASE_URL", server.database_url)

        with start_services(say=print, kafka=False) as found:
            assert found.database_url == server.database_url
            assert found.database.endswith(f" at 127.0.0.1:{server.port}/postgres (DATABASE_URL)")


def test_env_postgres_away_is_unavailable_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgresql://someone:secret@127.0.0.1:1/nothing")

    with pytest.raises(ServiceUnavailable, match=r"127\.0\.0\.1:1/nothing does not answer") as caught:
        start_services("env", say=print, kafka=False)

    assert "secret" not in str(caught.value)


OWNER = """
import sys
from pipeline.local import MockBroker, PackagedKafka, PackagedPostgres, kafka_classpath
with PackagedKafka(kafka_classpath(lambda line: None)) as kafka, PackagedPostgres() as postgres:
    with MockBroker() as mock:
        print(kafka.pid, postgres.pid, mock.pid, kafka.data_dir.parent, postgres.log_path.parent, flush=True)
        sys.stdin.read()
"""


@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.usefixtures("kafka_jars")
def test_owner_ended_by_a_signal_leaves_no_process_and_no_folder(by: signal.Signals) -> None:
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as owner:
        assert owner.stdout is not None
        *pids, kafka_folder, postgres_folder = owner.stdout.readline().split()
        children = [os.pidfd_open(int(pid)) for pid in pids]
        assert len(children) == 3

        owner.send_signal(by)

        for child in children:
            assert has_ended(child, within_seconds=30)

    remove_orphans()  # as the next one started does; only kill -9 leaves it anything to do
    assert not Path(kafka_folder).exists()
    assert not Path(postgres_folder).exists()


def has_ended(pidfd: int, *, within_seconds: float) -> bool:
    """Wait on a process descriptor, which becomes readable when its process ends."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    try:
        return bool(poller.poll(within_seconds * 1000))
    finally:
        os.close(pidfd)


@pytest.mark.docker
async def test_docker_services_answer() -> None:
    with start_services("docker", say=print) as found:
        connection = await asyncpg.connect(found.database_url)
        assert await connection.fetchval("select 1") == 1
        await connection.close()
        create_topic(found.bootstrap_servers, "contained")
        produce(found.bootstrap_servers, "contained", b"hello")

        assert first_record(found.bootstrap_servers, "contained").value() == b"hello"
        assert found.database.startswith("PostgreSQL 17.")
