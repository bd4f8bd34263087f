"""Runs one scenario: processes, load, and faults at their times; then has it judged."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from pipeline.local import PackagedKafka, PackagedPostgres, PackagedRegistry
from tests.chaos import lag
from tests.chaos.load import Load, LoadShape
from tests.chaos.member import Member
from tests.chaos.verdict import Verdict, judge
from tests.support.deployment import Deployment, eventually
from tests.support.previous_version import MODULE as PREVIOUS_VERSION
from tests.support.previous_version import previous_version

AUDIT = Path(__file__).with_name("audit.sql")
APPLICATION_NAME = "chaos"  # of the harness's own connections; sinks have another, listeners none
SESSION_TIMEOUT_SECONDS = 3.0
START_SECONDS = 60.0
AFTERWARDS_SECONDS = 2.0  # the load goes on for at least this long after the last step

Action = Callable[["Run"], Awaitable[None]]
# What lasts: entered at one time and left, which undoes it, at another or when the run ends.
Fault = Callable[["Run"], AbstractAsyncContextManager[None]]


@dataclass(frozen=True)
class Scenario:
    """What is done, each at its second; after that everything has to recover by itself.

    `seconds`: how long the load runs, at least. Times are stretched by up to a quarter, by the seed.
    `prepare`: around everything, the database included; yields options for `create database`.
    `dead_letters`: how many records the dead-letter topic must hold in the end; at least as many if
    `dead_letters_repeat`, since a record whose process is killed before the commit is dead-lettered again.
    `module`: what its workers and sinks are run as, until a step upgrades them; None is today's version.
    """

    name: str
    steps: Sequence[tuple[float, Action]]
    seconds: float = 8.0
    workers: int = 1
    sinks: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    load: LoadShape = field(default_factory=LoadShape)
    prepare: Callable[[Run], AbstractAsyncContextManager[str]] | None = None
    dead_letters: int = 0
    dead_letters_repeat: bool = False
    needs: Callable[[], str | None] | None = None  # why it can't run here
    module: Sequence[str] | None = None
    is_selected: bool = False  # for `make test`, which has five minutes for all of them


@dataclass
class Services:
    """A Kafka and a Postgres that scenarios may break; both are whole again when a scenario ends."""

    kafka: PackagedKafka
    postgres: PackagedPostgres

    async def heal(self) -> None:
        """Start what a failed scenario has left stopped."""
        await asyncio.to_thread(self.kafka.start)
        await asyncio.to_thread(self.postgres.start)


class Run:
    """One scenario with one seed."""

    deployment: Deployment
    load: Load
    registry: PackagedRegistry | None = None  # of a scenario whose `prepare` starts one

    def __init__(
        self, services: Services, scenario: Scenario, seed: int, folder: Path, *, module: Sequence[str] = ("pipeline",)
    ) -> None:
        self.services = services
        self.scenario = scenario
        self.seed = seed
        self.members: list[Member] = []  # those that left included
        self.processes: list[Any] = []  # all that were ever started
        self._module = module  # a worker or sink is run as `python -m` this
        self._folder = folder
        self._database = f"chaos_{uuid.uuid4().hex[:8]}"
        self._cleanup = AsyncExitStack()
        self._faults = AsyncExitStack()
        self._lasting: dict[Fault, AsyncExitStack] = {}

    async def perform(self) -> Verdict:
        """Run the scenario; whatever happens, its processes end and the services are whole again.

        Raises: AssertionError, if something does not end in time, with the end of each log.
        """
        started = time.monotonic()
        if self.scenario.module == PREVIOUS_VERSION:
            previous_version()  # or nobody would see why its processes don't start
        async with self._cleanup:
            options = ""
            if self.scenario.prepare:
                options = await self._cleanup.enter_async_context(self.scenario.prepare(self))
            await self._create(options)
            try:
                await self._perform()
                verdict = await judge(self)
            except AssertionError as error:
                raise AssertionError(f"{self.scenario.name}, seed {self.seed}: {error}\n{self._logs()}") from error
        verdict.seconds = round(time.monotonic() - started, 1)
        return verdict

    async def _create(self, options: str) -> None:
        """Make database, topics and load; each line of cleanup is run in the reverse order."""
        async with self.server() as server:
            await server.execute(f"create database {self._database} {options}")
        self._cleanup.push_async_callback(self._drop_database)
        settings = {
            "stuck_seconds": 30,  # so that a watchdog ends what is stuck before the wait for lag 0 is over
            "window_seconds": 0.3,
            "batch_size": 40,
            "session_timeout_seconds": SESSION_TIMEOUT_SECONDS,
            **({"schema_registry_url": self.registry.url} if self.registry else {}),
            **self.scenario.settings,
        }
        url = _url_of(self.services.postgres.database_url, self._database)
        self.deployment = Deployment(self.services.kafka.bootstrap_servers, url, self._folder, **settings)
        self._cleanup.push_async_callback(self._delete_topics)
        await self._cleanup.enter_async_context(self._faults)
        self._cleanup.push_async_callback(self.services.heal)
        self._cleanup.callback(self.deployment.close)
        self._cleanup.push_async_callback(self._close_members)
        await self.deployment.prepare()
        async with self.connection() as connection:
            await connection.execute(AUDIT.read_text(encoding="utf-8"))
        config, topic = self.deployment.settings.client_config(), self.deployment.settings.events_topic
        registry_url = self.registry.url if self.registry else ""
        self.load = Load(config, topic, self.scenario.load, self.seed, registry_url)
        self._cleanup.callback(self.load.abandon)

    async def _perform(self) -> None:
        for role, count in (("sink", self.scenario.sinks), ("worker", self.scenario.workers)):
            for _ in range(count):
                self.join(role, module=self.scenario.module)
        self.join("watch", "--json")
        for member in self.active("worker") + self.active("sink"):
            await eventually(f"{member.role} owns partitions", member.is_ready, START_SECONDS)
        self.load.start()
        begin = time.monotonic()
        stretch = random.Random(f"{self.scenario.name} {self.seed}").uniform(1.0, 1.25)
        for at, action in sorted(self.scenario.steps, key=lambda step: step[0]):
            await asyncio.sleep(max(0.0, begin + at * stretch - time.monotonic()))
            await action(self)
        await asyncio.sleep(max(AFTERWARDS_SECONDS, begin + self.scenario.seconds * stretch - time.monotonic()))
        await asyncio.to_thread(self.load.pause)

    def start(self, *arguments: str, module: Sequence[str] | None = None) -> Any:
        """Start a command of the pipeline, by default of today's version."""
        process = self.deployment.start(*arguments, module=module or self._module)
        self.processes.append(process)
        return process

    def join(self, role: str, *arguments: str, module: Sequence[str] | None = None) -> None:
        """Start one more of a role, by default of today's version."""
        self.members.append(Member(self, role, *arguments, module=module))

    def active(self, role: str) -> list[Member]:
        """Return the members of a role that have not left, the oldest first."""
        return [member for member in self.members if member.role == role and not member.has_left]

    async def begin(self, fault: Fault) -> None:
        """Enter a fault that lasts."""
        self._lasting[fault] = await self._faults.enter_async_context(AsyncExitStack())
        await self._lasting[fault].enter_async_context(fault(self))

    async def end(self, fault: Fault) -> None:
        """Undo a fault that lasts."""
        await self._lasting.pop(fault).aclose()

    async def is_caught_up(self) -> bool:
        return set((await self.lag()).values()) == {0}

    async def lag(self) -> dict[str, int]:
        """How many records wait, by topic."""
        async with self.connection() as connection:
            return await lag.lag(self.deployment, connection)

    def ends(self, topic: str) -> dict[int, int]:
        """Where each partition of a topic ends now."""
        return lag.ends(self.services.kafka.bootstrap_servers, topic)

    async def ask_kafka(self, request: Callable[[AdminClient], Mapping[Any, Any]]) -> None:
        """Make a request of the admin API and wait until all of it is done."""
        admin = AdminClient({"bootstrap.servers": self.services.kafka.bootstrap_servers})
        for future in request(admin).values():
            await asyncio.to_thread(future.result, START_SECONDS)

    def connection(self) -> AbstractAsyncContextManager[Any]:
        """A connection to this run's database."""
        return _connected(_url_of(self.services.postgres.database_url, self._database))

    def server(self) -> AbstractAsyncContextManager[Any]:
        """A connection to the server's own database."""
        return _connected(_url_of(self.services.postgres.database_url, "postgres"))

    async def _close_members(self) -> None:
        await asyncio.gather(*(member.close() for member in self.members))

    async def _drop_database(self) -> None:
        async with self.server() as server:
            await server.execute(f"drop database {self._database} with (force)")

    async def _delete_topics(self) -> None:
        topics = list(self.deployment.settings.topic_names.values())
        with suppress(KafkaException):  # a scenario may have deleted some
            await self.ask_kafka(lambda admin: admin.delete_topics(topics))

    def _logs(self) -> str:
        logs = []
        for process in self.processes:
            last = self.deployment.log(process)[-1500:]
            logs.append(f"--- {process.role} {process.pid} ({process.poll()})\n{last}")
        return "\n".join(logs)


def _url_of(url: str, database: str) -> str:
    return urlsplit(url)._replace(path=f"/{database}").geturl()


@asynccontextmanager
async def _connected(url: str) -> AsyncIterator[Any]:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            connection = await asyncpg.connect(url, server_settings={"application_name": APPLICATION_NAME})
            break
        except (OSError, asyncpg.PostgresError):  # a scenario may hold all connections for a while
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.2)
    try:
        yield connection
    finally:
        with suppress(asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError):
            await connection.close(timeout=5)
