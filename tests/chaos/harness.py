"""Runs one scenario: processes, load, faults in their time; then waits for lag 0 and compares with the oracle."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.kafka.topics import TopicFacts, require_topics
from pipeline.local import PackagedKafka, PackagedPostgres
from tests.chaos.load import Load, LoadShape, Table
from tests.support.deployment import Deployment, eventually

AUDIT = Path(__file__).with_name("audit.sql")
APPLICATION_NAME = "chaos"  # of the harness's own connections; sinks have another, listeners none
SESSION_TIMEOUT_SECONDS = 3.0
START_SECONDS = 60.0
CATCH_UP_SECONDS = 120.0
STOP_SECONDS = 30.0
AFTERWARDS_SECONDS = 2.0  # the load goes on for at least so long after the last step
_RESTART_SECONDS = 0.3

Action = Callable[["Run"], Awaitable[None]]


@dataclass(frozen=True)
class Scenario:
    """At so many seconds do this; then everything has to come right by itself.

    `seconds`: how long the load runs, at least. Times are stretched by up to a quarter, by the seed.
    `dead_letters`: how many records the dead-letter topic must hold in the end; at least so many if
    `dead_letters_repeat`, since a record whose process is killed before the commit is dead-lettered again.
    """

    name: str
    steps: Sequence[tuple[float, Action]]
    seconds: float = 8.0
    workers: int = 1
    sinks: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    load: LoadShape = field(default_factory=LoadShape)
    prepare: Action | None = None
    clean_up: Action | None = None
    dead_letters: int = 0
    dead_letters_repeat: bool = False
    needs: Callable[[Services], str | None] | None = None  # why it can't run here
    is_selected: bool = False  # for `make test`, which has five minutes for all of it


@dataclass
class Verdict:
    """What one run found; all but the first four and the last three must be zero or empty."""

    scenario: str
    seed: int
    events: int
    rows: int
    rows_wrong: int = 0
    batches_twice: int = 0
    moves_back: int = 0
    unnoticed: int = 0  # rows whose last value no listener was told of
    problems: list[str] = field(default_factory=list)
    restarts: Counter[str] = field(default_factory=Counter)  # processes that ended by themselves, started again
    catch_up_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        return not (self.rows_wrong or self.batches_twice or self.moves_back or self.unnoticed or self.problems)


@dataclass
class Services:
    """A Kafka and a Postgres that scenarios may break; both are whole again when a scenario ends."""

    kafka: PackagedKafka
    postgres: PackagedPostgres

    async def heal(self) -> None:
        """Start what a scenario that failed has left down."""
        await asyncio.to_thread(self.kafka.start)
        await asyncio.to_thread(self.postgres.start)


class Member:
    """One worker, sink or listener, started again by its supervisor whenever it ends, however it ends."""

    def __init__(self, run: Run, role: str, *arguments: str) -> None:
        self.role = role
        self.ends: list[str] = []
        self._run = run
        self._arguments = (role, *arguments)
        self._is_wanted = True
        self._killed: set[int] = set()
        self.process = self._start()
        self._supervisor = asyncio.create_task(self._supervise())

    def _start(self) -> subprocess.Popen[bytes]:
        process = self._run.deployment.start(*self._arguments, module=self._run.module)
        self._run.started.append(process)
        return process

    async def _supervise(self) -> None:
        while self._is_wanted:
            code = self.process.poll()
            if code is None:
                await asyncio.sleep(0.03)
                continue
            if self.process.pid not in self._killed:
                last = self._run.deployment.log(self.process).strip().rpartition("\n")[2]
                self.ends.append(f"{self.role} ended with {code}: {last[-300:]}")
            await asyncio.sleep(_RESTART_SECONDS)
            if self._is_wanted:
                self.process = self._start()

    def kill(self) -> None:
        self._killed.add(self.process.pid)
        self.process.kill()

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    async def restart(self) -> None:
        """Ask it to end, wait until it has, and until its heir is started.

        Raises: AssertionError, if it does not end well and in time.
        """
        process = self.process
        self._killed.add(process.pid)
        process.terminate()
        await eventually(f"{self.role} ends after SIGTERM", lambda: process.poll() is not None, STOP_SECONDS)
        if process.returncode != 0:
            self.ends.append(f"{self.role} ended with {process.returncode} after SIGTERM")
        await eventually(f"{self.role} is started again", lambda: self.process is not process)

    async def leave(self) -> None:
        """Ask it to end for good."""
        self._is_wanted = False
        await self._supervisor
        self.process.terminate()
        await eventually(f"{self.role} ends after SIGTERM", lambda: self.process.poll() is not None, STOP_SECONDS)

    def is_ready(self) -> bool:
        """Say whether this process (not one before it) has got its partitions."""
        return self.process.poll() is None and '"partitions_assigned"' in self._run.deployment.log(self.process)

    async def close(self) -> None:
        self._is_wanted = False
        self._supervisor.cancel()
        with suppress(asyncio.CancelledError):
            await self._supervisor
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Run:
    """One scenario with one seed."""

    def __init__(
        self, services: Services, scenario: Scenario, seed: int, folder: Path, *, module: Sequence[str] = ("pipeline",)
    ) -> None:
        self.services = services
        self.scenario = scenario
        self.seed = seed
        self.module = module  # what is run for a worker or sink: `python -m` this
        self.dice = random.Random(f"{scenario.name} {seed}")
        self.database = f"chaos_{uuid.uuid4().hex[:8]}"
        self.folder = folder
        self.members: dict[str, list[Member]] = {"worker": [], "sink": [], "watch": []}
        self.left: list[Member] = []
        self.started: list[Any] = []  # all processes that ever were
        self.holding: list[Any] = []  # connections that a fault keeps open
        self.tablespace = ""
        self.disk = Path()
        self.marks: dict[int, int] = {}  # where the events topic ended once
        self.deployment: Deployment
        self.load: Load

    async def perform(self) -> Verdict:
        """Run the scenario; whatever happens, its processes end and the services are whole again.

        Raises: AssertionError, if something does not come to an end in time, with the end of each log.
        """
        started = time.monotonic()
        if self.scenario.prepare:
            await self.scenario.prepare(self)
        await self._create()
        try:
            verdict = await self._perform()
            verdict.seconds = round(time.monotonic() - started, 1)
            return verdict
        except AssertionError as error:
            raise AssertionError(f"{self.scenario.name}, seed {self.seed}: {error}\n{self._logs()}") from error
        finally:
            await self._close()

    async def _create(self) -> None:
        where = f" tablespace {self.tablespace}" if self.tablespace else ""
        async with self.server() as server:
            await server.execute(f"create database {self.database}{where}")
        url = urlsplit(self.services.postgres.database_url)._replace(path=f"/{self.database}").geturl()
        settings = {
            "stuck_seconds": 30,  # so that what a watchdog has to end is over before the wait for lag 0 is
            "window_seconds": 0.3,
            "batch_size": 40,
            "session_timeout_seconds": SESSION_TIMEOUT_SECONDS,
            **self.scenario.settings,
        }
        self.deployment = Deployment(self.services.kafka.bootstrap_servers, url, self.folder, **settings)
        await self.deployment.prepare()
        async with self.connection() as connection:
            await connection.execute(AUDIT.read_text(encoding="utf-8"))
        config, topic = self.deployment.settings.client_config(), self.deployment.settings.events_topic
        self.load = Load(config, topic, self.scenario.load, self.seed)

    async def _perform(self) -> Verdict:
        for role, number in (("sink", self.scenario.sinks), ("worker", self.scenario.workers)):
            self.members[role] = [Member(self, role) for _ in range(number)]
        self.members["watch"] = [Member(self, "watch", "--json")]
        for member in self.members["worker"] + self.members["sink"]:
            await eventually(f"{member.role} owns partitions", member.is_ready, START_SECONDS)
        self.load.start()
        begin = time.monotonic()
        stretch = self.dice.uniform(1.0, 1.25)
        for at, action in self.scenario.steps:
            await asyncio.sleep(max(0.0, begin + at * stretch - time.monotonic()))
            await action(self)
        await asyncio.sleep(max(AFTERWARDS_SECONDS, begin + self.scenario.seconds * stretch - time.monotonic()))
        await asyncio.to_thread(self.load.pause)
        return await self._judge()

    async def _judge(self) -> Verdict:
        expected = self.load.expected()
        verdict = Verdict(self.scenario.name, self.seed, self.load.accepted, len(expected))
        since = time.monotonic()
        try:
            await eventually("lag is 0", self.is_caught_up, CATCH_UP_SECONDS)
        except AssertionError:
            verdict.problems.append(f"lag not 0 after {CATCH_UP_SECONDS} s: {await self.lag()}")
        verdict.catch_up_seconds = round(time.monotonic() - since, 1)
        held = await self.deployment.table()
        wrong = _differences(expected, held)
        verdict.rows_wrong = len(wrong)
        verdict.problems += [f"{pair}: {held.get(pair)} instead of {expected.get(pair)}" for pair in wrong[:3]]
        await self._audit(verdict)
        await self._hear(verdict, held)
        self._count_dead_letters(verdict)
        verdict.problems += [f"not accepted: {text}" for text in sorted(set(self.load.refused))]
        for member in [member for members in self.members.values() for member in members] + self.left:
            if member.ends:
                verdict.restarts[member.role] += len(member.ends)
        return verdict

    async def _audit(self, verdict: Verdict) -> None:
        async with self.connection() as connection:
            verdict.moves_back = await connection.fetchval("select count(*) from audit_rows where went_back")
            # Each value is made once, so a batch that had its effect twice would write one a second time.
            again = await connection.fetchval(
                "select count(*) from "
                "(select from audit_rows group by agent_id, key, value having count(*) > 1) as again"
            )
            # Each step must begin where the one before it ended.
            torn = await connection.fetchval(
                "select count(*) from (select before, after, lag(after, 1, 0::bigint) over "
                "(partition by topic_id, partition order by number) as reached from audit_progress) as steps "
                "where before <> reached or after < before"
            )
        verdict.batches_twice = again + torn

    async def _hear(self, verdict: Verdict, held: Table) -> None:
        """Check what the listener has shown: every row as it is now, and none that went back."""
        with suppress(AssertionError):
            await eventually("the listener has shown all rows", lambda: not self._unheard(held), 30.0)
        verdict.unnoticed = len(self._unheard(held))
        for process in self._watching():
            verdict.moves_back += _moves_back(_shown(process.output_path))

    def _unheard(self, held: Table) -> set[tuple[str, str]]:
        heard: dict[tuple[str, str], tuple[str, str, datetime]] = {}
        for process in self._watching():
            heard.update(_shown(process.output_path))
        return {pair for pair, content in held.items() if heard.get(pair) != content}

    def _watching(self) -> list[Any]:
        return [process for process in self.started if process.role == "watch"]

    def _count_dead_letters(self, verdict: Verdict) -> None:
        found, wanted = self.ends(self.deployment.settings.dead_letter_topic)[0], self.scenario.dead_letters
        if found < wanted or (found > wanted and not self.scenario.dead_letters_repeat):
            verdict.problems.append(f"{found} dead letters instead of {wanted}")

    async def is_caught_up(self) -> bool:
        return set((await self.lag()).values()) == {0}

    async def lag(self) -> dict[str, int]:
        """How much waits, by topic: of events by what the workers committed, of batches by what Postgres holds."""
        return await asyncio.to_thread(self._events_lag) | await self._batches_lag()

    def _events_lag(self) -> dict[str, int]:
        settings = self.deployment.settings
        consumer = Consumer({"bootstrap.servers": settings.kafka_bootstrap_servers, "group.id": settings.worker_group})
        try:
            ends = self.ends(settings.events_topic)
            asked = [TopicPartition(settings.events_topic, number) for number in ends]
            committed = {item.partition: max(0, item.offset) for item in consumer.committed(asked, timeout=10)}
        finally:
            consumer.close()
        return {"events": sum(end - min(committed[number], end) for number, end in ends.items())}

    async def _batches_lag(self) -> dict[str, int]:
        batches = await asyncio.to_thread(lambda: self.topics()["batches"])
        ends = await asyncio.to_thread(self.ends, batches.name)
        async with self.connection() as connection:
            rows = await connection.fetch(
                "select partition, next_offset from agent_metadata_progress where topic_id = $1", batches.topic_id
            )
        applied = {row[0]: row[1] for row in rows}
        return {"batches": sum(end - applied.get(number, 0) for number, end in ends.items())}

    def topics(self) -> dict[str, TopicFacts]:
        settings = self.deployment.settings
        specs = settings.declared_topics()
        return asyncio.run(require_topics(settings.client_config(), specs))

    def ends(self, topic: str) -> dict[int, int]:
        """Where each partition of a topic ends now."""
        consumer = Consumer({"bootstrap.servers": self.services.kafka.bootstrap_servers, "group.id": "chaos"})
        try:
            numbers = consumer.list_topics(topic, timeout=10).topics[topic].partitions
            return {n: consumer.get_watermark_offsets(TopicPartition(topic, n), timeout=10)[1] for n in numbers}
        finally:
            consumer.close()

    async def ask_kafka(self, request: Callable[[AdminClient], Mapping[Any, Any]]) -> None:
        """Make a request of the admin API and wait until all of it is done."""
        admin = AdminClient({"bootstrap.servers": self.services.kafka.bootstrap_servers})
        for future in request(admin).values():
            await asyncio.to_thread(future.result, START_SECONDS)

    def connection(self) -> Any:
        """A connection to this run's database, as an async context manager."""
        return _Connected(self.services.postgres.database_url, self.database)

    def server(self) -> Any:
        """A connection to the server's own database."""
        return _Connected(self.services.postgres.database_url, "postgres")

    async def _close(self) -> None:
        await asyncio.to_thread(self.load._is_ending.set)
        members = [member for members in self.members.values() for member in members]
        await asyncio.gather(*(member.close() for member in members + self.left))
        self.deployment.close()
        for connection in self.holding:
            connection.terminate()
        await self.services.heal()
        async with self.server() as server:
            await server.execute(f"drop database {self.database} with (force)")
        if self.scenario.clean_up:
            await self.scenario.clean_up(self)
        settings = self.deployment.settings
        topics = list(settings.topic_names.values())
        with suppress(KafkaException):  # some may be gone
            await self.ask_kafka(lambda admin: admin.delete_topics(topics))

    def _logs(self) -> str:
        shown = []
        for process in self.started:
            last = self.deployment.log(process)[-1500:]
            shown.append(f"--- {process.role} {process.pid} ({process.poll()})\n{last}")
        return "\n".join(shown)


class _Connected:
    def __init__(self, url: str, database: str) -> None:
        self._url = urlsplit(url)._replace(path=f"/{database}").geturl()

    async def __aenter__(self) -> Any:
        # Out of connections is what some scenarios make of it: they end, so wait.
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self._connection = await asyncpg.connect(
                    self._url, server_settings={"application_name": APPLICATION_NAME}
                )
                return self._connection
            except (OSError, asyncpg.PostgresError):
                if time.monotonic() > deadline:
                    raise
                await asyncio.sleep(0.2)

    async def __aexit__(self, *_: object) -> None:
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
            await self._connection.close(timeout=5)


def _differences(expected: Table, held: Table) -> list[tuple[str, str]]:
    return sorted(pair for pair in expected.keys() | held.keys() if held.get(pair) != expected.get(pair))


def _shown(path: Path) -> list[tuple[tuple[str, str], tuple[str, str, datetime]]]:
    """Read the rows that `watch --json` printed, in order; its last line may be half a line."""
    shown = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            content = (row["value"], row["error"], datetime.fromisoformat(row["collected_at"]))
            shown.append(((row["agent_id"], row["key"]), content))
    return shown


def _moves_back(shown: Sequence[tuple[tuple[str, str], tuple[str, str, datetime]]]) -> int:
    newest: dict[tuple[str, str], tuple[datetime, int]] = {}
    back = 0
    for pair, (value, _, collected_at) in shown:
        order = (collected_at, int(value.split()[0]))
        back += order < newest.get(pair, order)
        newest[pair] = order
    return back
