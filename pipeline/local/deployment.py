"""A private pipeline: topics, consumer groups and tables that nobody else uses, and its commands as processes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.error import HTTPError
from urllib.request import urlopen

import asyncpg

from pipeline.errors import PipelineError, ServiceUnavailable
from pipeline.kafka.topics import create_topics, delete_topics
from pipeline.local.process import LOOPBACK
from pipeline.local.services import KAFKA_VARIABLE, POSTGRES_VARIABLE
from pipeline.postgres.migrations import migrate
from pipeline.roles.process import child_command
from pipeline.settings import PREFIX, load_settings

# The settings without the common prefix, and their variables.
ADDRESSES: Final = {"kafka_bootstrap_servers": KAFKA_VARIABLE, "database_url": POSTGRES_VARIABLE}

_START_SECONDS: Final = 60.0
# More than any command takes to stop by itself: a role drains for 15 s, and `run` kills it after 20 s.
_STOP_SECONDS: Final = 30.0
_POLL_SECONDS: Final = 0.02


def ask(port: int, path: str) -> tuple[int, str]:
    """GET a path of a role's own port; return status and body, (0, "") if it does not answer."""
    try:
        with urlopen(f"http://{LOOPBACK}:{port}{path}", timeout=5) as response:  # our own port
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


class Role(subprocess.Popen[bytes]):
    """A command of the pipeline as a process in a session of its own, which gets SIGTERM when this process ends.

    `output_path` has what it prints, `log_path` what it logs; None is this process's stderr.
    """

    def __init__(
        self,
        role: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        output_path: Path,
        log_path: Path | None,
    ) -> None:
        self.role = role
        self.output_path = output_path
        self.log_path = log_path
        with ExitStack() as files:
            super().__init__(
                child_command(command),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=files.enter_context(output_path.open("wb")),
                stderr=files.enter_context(log_path.open("wb")) if log_path else None,
                start_new_session=True,
            )


class Deployment:
    """One private pipeline: its settings, its processes, its tables.

    `environment` is what its processes get besides this process's own; changes to it reach those that start later.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        database_url: str,
        folder: Path,
        *,
        run_id: str = "",
        own_schema: bool = False,
        logs_to_stderr: bool = False,
        **settings: Any,
    ) -> None:
        """Name everything; prepare() creates it.

        Args:
            bootstrap_servers: A Kafka, which others may use too.
            database_url: A database: an empty one, or any one with `own_schema`.
            folder: Where output and logs of its processes go.
            run_id: Names its topics, groups and schema; by default a random one.
            own_schema: Put its tables into a schema named `run_id` instead of the default one.
            logs_to_stderr: Leave the logs to this process's stderr.
            settings: Fields of Settings, over those given by the environment.

        Raises:
            ConfigError: a setting is wrong, here or in the environment.
        """
        self.run_id = run_id or uuid.uuid4().hex[:8]
        self._server_url = database_url
        self._schema = self.run_id if own_schema else ""
        values = {
            "kafka_bootstrap_servers": bootstrap_servers,
            "database_url": _with_search_path(database_url, self._schema),
            "events_topic": f"events.{self.run_id}",
            "batches_topic": f"batches.{self.run_id}",
            "dead_letter_topic": f"dead-letter.{self.run_id}",
            "consumer_group": self.run_id,
            **settings,
        }
        self.environment = {_variable(name): str(value) for name, value in values.items()}
        self.settings = load_settings(**values)
        self.topics = self.settings.declared_topics()
        self._folder = folder
        self._logs_to_stderr = logs_to_stderr
        self._processes: list[subprocess.Popen[Any]] = []

    async def prepare(self) -> None:
        """Create topics and tables."""
        await asyncio.to_thread(create_topics, self.settings.client_config(), self.topics)
        if self._schema:
            async with _connection(self._server_url) as connection:
                await connection.execute(f'create schema if not exists "{self._schema}"')
        async with self.connection() as connection:
            await migrate(connection, unlogged=self.settings.unlogged)

    async def drop(self) -> None:
        """Delete the topics, and the tables if they have a schema of their own, as far as the services still answer."""
        with suppress(PipelineError):
            await asyncio.to_thread(delete_topics, self.settings.client_config(), self.topics)
        if self._schema:
            with suppress(OSError, asyncpg.PostgresError):
                async with _connection(self._server_url) as connection:
                    await connection.execute(f'drop schema if exists "{self._schema}" cascade')

    def command(self, *arguments: str, module: Sequence[str] = ("pipeline",)) -> list[str]:
        """Return the command line of `python -m module arguments`."""
        return [sys.executable, "-m", *module, *arguments]

    def start(self, *arguments: str, module: Sequence[str] = ("pipeline",)) -> Role:
        """Start `python -m module arguments`; its files are named after the first argument."""
        log_path = self._folder / f"{arguments[0]}-{self.run_id}-{len(self._processes)}.log"
        role = Role(
            arguments[0],
            self.command(*arguments, module=module),
            environment={**os.environ, **self.environment},
            output_path=log_path.with_suffix(".out"),
            log_path=None if self._logs_to_stderr else log_path,
        )
        self._processes.append(role)
        return role

    async def started(self, role: str) -> Role:
        """Start a role and return when it owns its partitions; AGENT_METADATA_LOG_FORMAT must be json.

        Raises:
            ServiceUnavailable: it ended first, or took longer than 60 s.
        """
        process = self.start(role)
        deadline = time.monotonic() + _START_SECONDS
        while not self.logged(process, "partitions_assigned"):
            if time.monotonic() > deadline:
                raise ServiceUnavailable(f"{role} got no partitions within {_START_SECONDS:.0f} s: {self.log(process)}")
            await asyncio.sleep(_POLL_SECONDS)
        return process

    async def ready(self, role: Role, *ports: int) -> None:
        """Return when all ports of a role answer that they are ready.

        Raises:
            ServiceUnavailable: it ended first, or took longer than 60 s.
        """
        deadline = time.monotonic() + _START_SECONDS
        while any(ask(port, "/ready")[0] != 200 for port in ports):
            if role.poll() is not None or time.monotonic() > deadline:
                raise ServiceUnavailable(f"`{role.role}` did not come up: see its messages above")
            await asyncio.sleep(_POLL_SECONDS)

    def logged(self, role: Role, event: str) -> list[dict[str, Any]]:
        """Return the entries of this name that a running role has logged.

        Raises:
            ServiceUnavailable: it has ended; the message has the end of its log.
        """
        if role.poll() is not None:
            raise ServiceUnavailable(f"{role.role} ended with {role.returncode}: {self.log(role)[-3000:]}")
        lines = (line for line in self.log(role).splitlines() if line.startswith("{"))
        return [entry for entry in map(json.loads, lines) if entry.get("event") == event]

    def log(self, role: Role) -> str:
        """Return all that a role has logged."""
        return role.log_path.read_text(encoding="utf-8") if role.log_path else ""

    def stop(self, role: Role) -> int:
        """Stop a role cleanly; return its exit code.

        Raises:
            ServiceUnavailable: it did not stop within 30 s, and has been killed.
        """
        role.terminate()
        try:
            return role.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill(role)
            raise ServiceUnavailable(f"{role.role} did not stop within {_STOP_SECONDS:.0f} s") from None

    def stop_all(self) -> None:
        """Cleanly stop what still runs, last started first; kill what does not stop within 30 s."""
        for process in reversed(self._processes):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
        self.close()

    def kill(self, role: Role) -> None:
        """Kill a role and wait for its end."""
        role.kill()
        role.wait()

    def close(self) -> None:
        """Kill all processes."""
        for process in self._processes:
            process.kill()
            process.wait()

    @asynccontextmanager
    async def connection(self) -> AsyncIterator[asyncpg.Connection]:
        """Connect to its tables."""
        async with _connection(self.settings.database_url.get_secret_value()) as connection:
            yield connection


@asynccontextmanager
async def _connection(url: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(url)
    try:
        yield connection
    finally:
        await connection.close()


def _variable(name: str) -> str:
    return ADDRESSES.get(name, f"{PREFIX}{name.upper()}")


def _with_search_path(database_url: str, schema: str) -> str:
    if not schema:
        return database_url
    separator = "&" if "?" in database_url else "?"
    return f"{database_url}{separator}search_path={schema}"
