"""What a scenario can do to a pipeline: each function makes an action, to be called with the run."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import asyncpg
import psutil
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import NewPartitions

from pipeline.kafka.topics import create_topics
from tests.chaos.harness import START_SECONDS, Action, Member, Run, Services
from tests.chaos.load import POISON
from tests.support.deployment import eventually

SINKS = "application_name = 'agent-metadata-sink' and datname = current_database()"
LISTENERS = "application_name = '' and backend_type = 'client backend' and datname = current_database()"


def all_of(*actions: Action) -> Action:
    """Do these one after the other."""

    async def act(run: Run) -> None:
        for action in actions:
            await action(run)

    return act


# Processes


def kill(role: str, number: int = 0) -> Action:
    """kill -9, once it owns partitions; the supervisor starts it again."""

    async def act(run: Run) -> None:
        member = run.members[role][number]
        await eventually(f"{role} owns partitions", member.is_ready, START_SECONDS)
        member.kill()

    return act


def freeze(role: str, number: int = 0) -> Action:
    """SIGSTOP."""

    async def act(run: Run) -> None:
        run.members[role][number].freeze()

    return act


def thaw(role: str, number: int = 0) -> Action:
    """SIGCONT."""

    async def act(run: Run) -> None:
        run.members[role][number].thaw()

    return act


def restart_each(role: str) -> Action:
    """Restart all of a role one after the other, each once the one before it has its partitions again."""

    async def act(run: Run) -> None:
        for member in run.members[role]:
            await member.restart()
            await eventually(f"{role} owns partitions again", member.is_ready, START_SECONDS)

    return act


def join(role: str) -> Action:
    """Start one more."""

    async def act(run: Run) -> None:
        run.members[role].append(Member(run, role))

    return act


def leave(role: str) -> Action:
    """Have the last one end for good, well."""

    async def act(run: Run) -> None:
        member = run.members[role].pop()
        run.left.append(member)
        await member.leave()

    return act


def replay(source: str) -> Action:
    """Replay all that a topic holds, from beginning to end; Kafka and Postgres must be up."""

    async def act(run: Run) -> None:
        process = run.deployment.start("replay", "--from", "1d ago", "--source", source, module=run.module)
        run.started.append(process)
        await eventually("the replay ends", lambda: process.poll() is not None, START_SECONDS)
        assert process.returncode == 0, run.deployment.log(process)

    return act


def in_transaction(act_on: Callable[[Run, Member], None]) -> Action:
    """Do it to a sink that is in the middle of a transaction: progress locked, rows written, nothing committed."""

    async def act(run: Run) -> None:
        async with run.connection() as holding, holding.transaction():
            found = "select count(*) from workspace_agent_metadata where workspace_agent_id = $1"
            await eventually("its row is there", lambda: holding.fetchval(found, max(run.load.lasting)))
            # A sink locks rows in the order of agents: it stops at this one, with those before written.
            await holding.execute(
                "select from workspace_agent_metadata where workspace_agent_id = $1 for update", max(run.load.lasting)
            )
            act_on(run, await eventually("a sink waits in its transaction", lambda: _waiting_sink(run)))

    return act


async def _waiting_sink(run: Run) -> Member | None:
    async with run.connection() as connection:
        port = await connection.fetchval(
            f"select client_port from pg_stat_activity where {SINKS} and wait_event_type = 'Lock' limit 1"
        )
    for member in run.members["sink"]:
        sockets = psutil.Process(member.process.pid).net_connections() if port else ()
        if any(socket.laddr.port == port for socket in sockets):
            return member
    return None


def kill_it(_run: Run, sink: Member) -> None:
    """kill -9."""
    sink.kill()


def kill_it_and_a_worker(run: Run, sink: Member) -> None:
    """kill -9 of both."""
    sink.kill()
    run.members["worker"][0].kill()


def freeze_it(run: Run, sink: Member) -> None:
    """SIGSTOP; `thaw` of sink 0 wakes it."""
    sink.freeze()
    run.members["sink"].remove(sink)
    run.members["sink"].insert(0, sink)


# Kafka


async def restart_kafka(run: Run) -> None:
    await asyncio.to_thread(run.services.kafka.restart)


async def kill_kafka(run: Run) -> None:
    await asyncio.to_thread(run.services.kafka.kill)


async def stop_kafka(run: Run) -> None:
    await asyncio.to_thread(run.services.kafka.stop)


async def start_kafka(run: Run) -> None:
    await asyncio.to_thread(run.services.kafka.start)


def delete(topic: str) -> Action:
    """Delete a topic, by its role."""

    async def act(run: Run) -> None:
        name = run.deployment.settings.topic_names[topic]
        await run.ask_kafka(lambda admin: admin.delete_topics([name]))

    return act


async def stop_the_load(run: Run) -> None:
    await asyncio.to_thread(run.load.pause)


async def start_the_load(run: Run) -> None:
    run.load.start()


async def catch_up(run: Run) -> None:
    """Wait until all is applied."""
    await eventually("lag is 0", run.is_caught_up, START_SECONDS)


async def delete_unread_events(run: Run) -> None:
    """With no worker about, delete what waits in the events topic, as retention would; it is lost, and known to be."""
    topic = run.deployment.settings.events_topic
    ends = await asyncio.to_thread(run.ends, topic)
    upto = [TopicPartition(topic, number, end) for number, end in ends.items()]
    await run.ask_kafka(lambda admin: admin.delete_records(upto))
    lost = run.load.forget({number: (run.marks.get(number, 0), end) for number, end in ends.items()})
    assert lost, "nothing waited in the topic: the scenario shows nothing"


async def mark_ends(run: Run) -> None:
    """Note where the events topic ends: everything before is applied."""
    run.marks = await asyncio.to_thread(run.ends, run.deployment.settings.events_topic)


async def make_topics_anew(run: Run) -> None:
    """Delete events and batches, and create them: offsets begin at 0 again."""
    await all_of(delete("events"), delete("batches"), create)(run)


async def create(run: Run) -> None:
    """Create the topics that are missing."""
    settings = run.deployment.settings
    specs = settings.declared_topics()
    await asyncio.to_thread(create_topics, settings.client_config(), specs)


async def bring_up_a_fresh_kafka(run: Run) -> None:
    """Another cluster at the same address: no topics, no groups, no offsets."""
    kafka = run.services.kafka
    await asyncio.to_thread(kafka.kill)
    await asyncio.to_thread(shutil.rmtree, kafka.data_dir)
    await asyncio.to_thread(kafka.start)
    await create(run)


def add_partitions(count: int) -> Action:
    """Have more partitions of both topics; an agent's reports may come from two of them for a while."""

    async def act(run: Run) -> None:
        run.load.ties = False
        settings = run.deployment.settings
        for topic in (settings.batches_topic, settings.events_topic):
            more = NewPartitions(topic, count)
            await run.ask_kafka(lambda admin, more=more: admin.create_partitions([more]))  # type: ignore[misc]

    return act


def produce(role: str, records: Sequence[tuple[bytes, bytes]], partition: int = -1) -> Action:
    """Produce these (key, value) to a topic, by role, and wait for their acknowledgement."""

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


# Postgres


async def restart_postgres(run: Run) -> None:
    await asyncio.to_thread(run.services.postgres.restart)


async def kill_postgres(run: Run) -> None:
    await asyncio.to_thread(run.services.postgres.kill)


async def stop_postgres(run: Run) -> None:
    await asyncio.to_thread(run.services.postgres.stop)


async def start_postgres(run: Run) -> None:
    await asyncio.to_thread(run.services.postgres.start)


async def kill_a_backend(run: Run) -> None:
    """kill -9 of a process that serves a sink: Postgres ends all others too and recovers as from a crash."""
    async with run.connection() as connection:
        pid = await eventually(
            "a sink is connected",
            lambda: connection.fetchval(f"select pid from pg_stat_activity where {SINKS} limit 1"),
        )
    os.kill(pid, signal.SIGKILL)


async def cut_the_listener(run: Run) -> None:
    async with run.connection() as connection:
        await connection.execute(f"select pg_terminate_backend(pid) from pg_stat_activity where {LISTENERS}")


async def take_all_connections(run: Run) -> None:
    """Leave none for a sink, and cut those it has."""
    settled = 0
    async with run.connection() as connection:
        while settled < 5:
            await connection.execute(f"select pg_terminate_backend(pid) from pg_stat_activity where {SINKS}")
            try:
                run.holding.append(await _plain_connection(run))
                settled = 0
            except asyncpg.TooManyConnectionsError:
                settled += 1
                await asyncio.sleep(0.05)


async def give_connections_back(run: Run) -> None:
    while run.holding:
        run.holding.pop().terminate()


async def _plain_connection(run: Run) -> Any:
    return await asyncpg.connect(
        run.services.postgres.database_url, server_settings={"application_name": "chaos-holding"}
    )


def read_only(is_on: bool) -> Action:
    """Refuse writes, as a standby does; open sessions included."""

    async def act(run: Run) -> None:
        async with run.server() as server:
            await server.execute(f"alter system set default_transaction_read_only = {'on' if is_on else 'off'}")
            await server.execute("select pg_reload_conf()")

    return act


async def shrink_notify_queue(run: Run) -> None:
    """The smallest NOTIFY queue that Postgres takes: half a megabyte."""
    async with run.server() as server:
        await server.execute("alter system set max_notify_queue_pages = 64")
    await restart_postgres(run)


async def restore_settings(run: Run) -> None:
    async with run.server() as server:
        await server.execute("alter system reset all")
    await restart_postgres(run)


async def fill_notify_queue(run: Run) -> None:
    """A listener goes to sleep in a transaction, and others say so much that the queue is full."""
    asleep = await asyncpg.connect(run.deployment.environment["DATABASE_URL"])
    run.holding.append(asleep)
    await asleep.execute("listen chaos")
    await asleep.execute("begin")
    await asleep.execute("select 1")
    async with run.connection() as connection:
        with suppress(asyncpg.ProgramLimitExceededError):
            while True:
                await connection.execute("select pg_notify('chaos', repeat('x', 7000))")


def why_no_small_disk(_services: Services) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=True, capture_output=True)
            subprocess.run(["umount", folder], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            return "a small disk can't be mounted here: that needs root"
    return None


async def put_database_on_a_small_disk(run: Run) -> None:
    run.disk = Path(tempfile.mkdtemp(prefix="chaos-disk-"))
    await _command("mount", "-t", "tmpfs", "-o", "size=40m,mode=0700", "none", str(run.disk))
    owner = psutil.Process(run.services.postgres.pid)
    os.chown(run.disk, owner.uids().effective, owner.gids().effective)
    run.tablespace = f"small_{uuid.uuid4().hex[:8]}"
    async with run.server() as server:
        await server.execute(f"create tablespace {run.tablespace} location '{run.disk}'")


async def remove_small_disk(run: Run) -> None:
    async with run.server() as server:
        await server.execute(f"drop tablespace {run.tablespace}")
    await _command("umount", str(run.disk))
    run.disk.rmdir()


async def fill_the_disk(run: Run) -> None:
    with (run.disk / "ballast").open("wb", buffering=0) as ballast, suppress(OSError):
        while ballast.write(bytes(8192)):
            pass


async def empty_the_disk(run: Run) -> None:
    (run.disk / "ballast").unlink()


async def _command(*words: str) -> None:
    await asyncio.to_thread(subprocess.run, words, check=True, capture_output=True)


async def refuse_poison(run: Run) -> None:
    """Have Postgres refuse a value that the pipeline lets pass."""
    async with run.connection() as connection:
        await connection.execute(f"alter table workspace_agent_metadata add check (value not like '% {POISON}')")


async def cut_the_frozen_sink(run: Run) -> None:
    """End the frozen sink's sessions, as Postgres does once the host of a client does not answer; its heir goes on."""
    async with run.connection() as connection:
        await connection.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity "
            f"where {SINKS} and state like 'idle in transaction%'"
        )


def bad_reports(count: int) -> list[tuple[bytes, bytes]]:
    """Records that are no reports, in several ways."""
    kinds = (b"{", b"\xff\xfe", b'{"agent_id":"agent-7","entries":[{"key":"k"}]}', b"[]")
    return [(b"bad %d" % number, kinds[number % len(kinds)]) for number in range(count)]


def bad_batches(count: int) -> list[tuple[bytes, bytes]]:
    """Records that are no batches, in several ways."""
    kinds = (b"{", b"\xff\xfe", b'{"version":2}')
    return [(b"", kinds[number % len(kinds)]) for number in range(count)]


def report_of_new_agents(count: int, bad: int) -> Action:
    """Report once of each of so many agents; so many of the values are POISON, which `refuse_poison` refuses."""

    async def act(run: Run) -> None:
        await stop_the_load(run)
        await asyncio.to_thread(run.load.report_of_new_agents, count, bad)
        await start_the_load(run)

    return act
