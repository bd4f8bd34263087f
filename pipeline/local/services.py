"""Where Kafka, Postgres and the schema registry of a demo, a test or a benchmark come from: given, or started here."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, assert_never, get_args
from urllib.parse import parse_qs, urlsplit

from pipeline.errors import ConfigError, ServiceUnavailable
from pipeline.local.docker import (
    KAFKA_IMAGE,
    POSTGRES_IMAGE,
    docker_answers,
    start_kafka_container,
    start_postgres_container,
)
from pipeline.local.kafka import KAFKA_VERSION, PackagedKafka, jdk_version, kafka_classpath
from pipeline.local.mock_broker import MockBroker
from pipeline.local.postgres import BINARIES_VARIABLE, PackagedPostgres
from pipeline.local.registry import REGISTRY_VERSION, PackagedRegistry, registry_folder

ServicesKind = Literal["env", "docker", "packages", "embedded"]
Say = Callable[[str], None]

KAFKA_VARIABLE = "KAFKA_BOOTSTRAP_SERVERS"
POSTGRES_VARIABLE = "DATABASE_URL"
REGISTRY_VARIABLE = "AGENT_METADATA_SCHEMA_REGISTRY_URL"

_ANSWER_SECONDS = 10.0


class _Service(NamedTuple):
    """One service that answers: where, and what it is in words."""

    address: str
    description: str


_NOT_STARTED = _Service("", "not started")


@dataclass
class LocalServices:
    """Kafka, Postgres and perhaps a schema registry to run against, from start_services().

    Guarantee: what was started for it ends with the context, or with this process if that dies first.
    Services given by environment variables are left alone.
    """

    bootstrap_servers: str
    database_url: str = field(repr=False)  # which includes the password
    broker: str
    """What Kafka is, in words without secrets; `database` likewise."""
    database: str
    is_real_kafka: bool
    """False for the embedded broker: no rebalances, restarts or LogAppendTime there."""
    _started: ExitStack = field(repr=False)
    registry_url: str = ""
    registry: str = _NOT_STARTED.description

    def close(self) -> None:
        """End what was started; calling it again does nothing."""
        self._started.close()

    def __enter__(self) -> LocalServices:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def start_services(
    kind: ServicesKind | None = None,
    *,
    say: Say,
    postgres: bool = True,
    kafka: bool = True,
    registry: bool = False,
    prefer_docker: bool = False,
) -> LocalServices:
    """Find or start Kafka and Postgres, and a schema registry where asked for, and return when all answer.

    With no `kind`, each comes from its environment variable (KAFKA_BOOTSTRAP_SERVERS, DATABASE_URL) if that
    is set; else from Docker, but only if preferred and an engine answers; else from packages. Where Kafka's
    jars can't be fetched, the embedded broker stands in for Kafka. Postgres is the same for `embedded` and
    `packages`.

    Args:
        kind: Use this source for both, or fail.
        say: Receives a line at every step that takes time or is a second choice.
        postgres: False leaves Postgres out; its fields are empty then.
        kafka: False leaves Kafka out; its fields are empty then.
        registry: Find or start a schema registry too: AGENT_METADATA_SCHEMA_REGISTRY_URL, else one from packages.
        prefer_docker: Try Docker before packages, as tests do.

    Raises:
        ConfigError: `kind` is not possible here: a variable or a package is missing.
        ServiceUnavailable: something did not come up, or does not answer.
    """
    if kind is not None and kind not in get_args(ServicesKind):
        raise ConfigError(f"{kind!r} is not a kind of services: choose one of {', '.join(get_args(ServicesKind))}")
    with ExitStack() as stack:
        # Postgres first: it is ready in under a second, so a wrong DATABASE_URL shows before a long download.
        database = _find_postgres(kind, prefer_docker, stack, say) if postgres else _NOT_STARTED
        broker, is_real = _find_kafka(kind, prefer_docker, stack, say) if kafka else (_NOT_STARTED, False)
        schemas = _find_registry(kind, stack, say) if registry else _NOT_STARTED
        return LocalServices(
            bootstrap_servers=broker.address,
            database_url=database.address,
            broker=broker.description,
            database=database.description,
            is_real_kafka=is_real,
            _started=stack.pop_all(),
            registry_url=schemas.address,
            registry=schemas.description,
        )


def _find_kafka(kind: ServicesKind | None, prefer_docker: bool, stack: ExitStack, say: Say) -> tuple[_Service, bool]:
    """Return Kafka and whether it is a real one."""
    match kind:
        case "env":
            return _given_kafka(), True
        case "docker":
            return _kafka_in_docker(stack, say), True
        case "packages":
            return _packaged_kafka(kafka_classpath(say), stack, say), True
        case "embedded":
            return _embedded_kafka(stack, say), False
        case None:
            return _first_kafka(prefer_docker, stack, say)
        case _:
            assert_never(kind)


def _first_kafka(prefer_docker: bool, stack: ExitStack, say: Say) -> tuple[_Service, bool]:
    if os.environ.get(KAFKA_VARIABLE):
        return _given_kafka(), True
    if prefer_docker and docker_answers():
        try:
            return _kafka_in_docker(stack, say), True
        except (ServiceUnavailable, ConfigError) as error:
            say(f"{error}; using Kafka from packages instead")
    try:
        classpath = kafka_classpath(say)
    except ServiceUnavailable as error:
        say(f"{error}; using the embedded broker instead, which is not a real Kafka")
        return _embedded_kafka(stack, say), False
    return _packaged_kafka(classpath, stack, say), True


def _find_postgres(kind: ServicesKind | None, prefer_docker: bool, stack: ExitStack, say: Say) -> _Service:
    match kind:
        case "env":
            return _given_postgres()
        case "docker":
            return _postgres_in_docker(stack, say)
        case "packages" | "embedded":
            return _packaged_postgres(stack, say)
        case None:
            return _first_postgres(prefer_docker, stack, say)
        case _:
            assert_never(kind)


def _first_postgres(prefer_docker: bool, stack: ExitStack, say: Say) -> _Service:
    if os.environ.get(POSTGRES_VARIABLE):
        return _given_postgres()
    if prefer_docker and docker_answers():
        try:
            return _postgres_in_docker(stack, say)
        except (ServiceUnavailable, ConfigError) as error:
            say(f"{error}; using PostgreSQL from packages instead")
    return _packaged_postgres(stack, say)


def _find_registry(kind: ServicesKind | None, stack: ExitStack, say: Say) -> _Service:
    if kind == "env" or (kind is None and os.environ.get(REGISTRY_VARIABLE)):
        url = _given(REGISTRY_VARIABLE)
        return _Service(url, f"schema registry at {_without_secrets(url)} ({REGISTRY_VARIABLE})")
    folder = registry_folder(say)
    say(f"starting Apicurio Registry {REGISTRY_VERSION}")
    url = stack.enter_context(PackagedRegistry(folder)).url
    return _Service(url, f"Apicurio Registry {REGISTRY_VERSION} from packages (JDK {jdk_version()})")


def _given(variable: str) -> str:
    value = os.environ.get(variable, "")
    if not value:
        raise ConfigError(f"{variable} is not set: set it, or choose services other than 'env'")
    return value


def _given_kafka() -> _Service:
    servers = _given(KAFKA_VARIABLE)
    return _Service(servers, f"Kafka at {servers} ({KAFKA_VARIABLE})")


def _given_postgres() -> _Service:
    url = _given(POSTGRES_VARIABLE)
    place = _without_secrets(url)
    return _Service(url, f"PostgreSQL {_server_version(url, place)} at {place} ({POSTGRES_VARIABLE})")


def _kafka_in_docker(stack: ExitStack, say: Say) -> _Service:
    say(f"starting {KAFKA_IMAGE} in Docker")
    return _Service(start_kafka_container(stack), f"Kafka from Docker ({KAFKA_IMAGE})")


def _postgres_in_docker(stack: ExitStack, say: Say) -> _Service:
    say(f"starting {POSTGRES_IMAGE} in Docker")
    url = start_postgres_container(stack)
    return _Service(url, f"PostgreSQL {_server_version(url, POSTGRES_IMAGE)} from Docker ({POSTGRES_IMAGE})")


def _packaged_kafka(classpath: list[Path], stack: ExitStack, say: Say) -> _Service:
    say(f"starting Apache Kafka {KAFKA_VERSION}")
    node = stack.enter_context(PackagedKafka(classpath))
    description = f"Apache Kafka {KAFKA_VERSION} from packages (JDK {jdk_version()})"
    return _Service(node.bootstrap_servers, description)


def _packaged_postgres(stack: ExitStack, say: Say) -> _Service:
    say("starting PostgreSQL")
    url = stack.enter_context(PackagedPostgres()).database_url
    origin = os.environ.get(BINARIES_VARIABLE) or "packages"
    return _Service(url, f"PostgreSQL {_server_version(url, 'the packaged server')} from {origin}")


def _embedded_kafka(stack: ExitStack, say: Say) -> _Service:
    import confluent_kafka

    say("starting the embedded broker")
    address = stack.enter_context(MockBroker()).bootstrap_servers
    version = confluent_kafka.libversion()[0]
    return _Service(address, f"embedded broker, not a real Kafka (mock cluster of librdkafka {version})")


def _without_secrets(url: str) -> str:
    """Return host, port and database of a URL, with no user, password or other parameters."""
    parts = urlsplit(url)
    hosts = parts.netloc.rpartition("@")[2] or ",".join(parse_qs(parts.query).get("host", ["the default host"]))
    return f"{hosts}{parts.path}"


def _server_version(url: str, place: str) -> str:
    """Ask a server for its version, in a thread, so that a caller inside an event loop may do so too."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, _query_version(url, place)).result()


async def _query_version(url: str, place: str) -> str:
    import asyncpg

    try:
        connection = await asyncpg.connect(url, timeout=_ANSWER_SECONDS)
        try:
            return str(await connection.fetchval("show server_version")).split()[0]
        finally:
            await connection.close()
    except (asyncpg.exceptions.ClientConfigurationError, ValueError) as error:
        raise ConfigError(
            f"{POSTGRES_VARIABLE} is not the URL of a Postgres (postgresql://user@host:port/database): "
            f"{type(error).__name__}"
        ) from None
    except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        reason = f"{type(error).__name__} {error}".strip()
        raise ServiceUnavailable(
            f"PostgreSQL at {place} does not answer ({reason}): start it, or unset {POSTGRES_VARIABLE}"
        ) from error
