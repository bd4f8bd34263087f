"""Fixtures: a Kafka and a Postgres for all tests, and a fresh database and pipeline for each."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, cast
from urllib.parse import urlsplit

import asyncpg
import hypothesis
import pytest

from pipeline.errors import PipelineError
from pipeline.local import LocalServices, ServicesKind, docker_answers, kafka_classpath, start_services
from pipeline.local.kafka import KAFKA_VERSION
from pipeline.local.postgres import postgres_binaries, postgres_version
from tests.support.deployment import Deployment

# On a busy machine an example may take long; hypothesis would call that flaky.
hypothesis.settings.register_profile("any-machine", deadline=None)
hypothesis.settings.load_profile("any-machine")

SERVICES = pytest.StashKey[LocalServices]()


def unavailable(reason: str, *, required_by: str) -> NoReturn:
    """Skip the test, or fail it if the named variable is 1: then CI relies on it."""
    if os.environ.get(required_by) == "1":
        pytest.fail(f"{reason} ({required_by}=1)", pytrace=False)
    pytest.skip(reason)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("docker") and not docker_answers():
        unavailable("no Docker engine answers", required_by="PIPELINE_REQUIRE_DOCKER")


def pytest_report_header() -> str:
    """Say what services from packages would be; the summary says which ones the tests used."""
    return f"packages: Apache Kafka {KAFKA_VERSION}, PostgreSQL {postgres_version(postgres_binaries())}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if services := config.stash.get(SERVICES, None):
        terminalreporter.write_line(f"services: {services.broker}; {services.database}")


@pytest.fixture(scope="session")
def services(pytestconfig: pytest.Config) -> Iterator[LocalServices]:
    """A real Kafka and a real Postgres; PIPELINE_SERVICES (env, docker, packages) says where they come from."""
    kind = cast("ServicesKind | None", os.environ.get("PIPELINE_SERVICES") or None)
    messages: list[str] = []
    try:
        started = start_services(kind, say=messages.append, prefer_docker=True)
    except PipelineError as error:
        if kind:
            raise
        unavailable(f"no services: {error}", required_by="PIPELINE_REQUIRE_SERVICES")
    with started:
        pytestconfig.stash[SERVICES] = started
        if not started.is_real_kafka:
            unavailable(f"no real Kafka: {'; '.join(messages)}", required_by="PIPELINE_REQUIRE_SERVICES")
        yield started


@pytest.fixture(scope="session")
def kafka_jars() -> list[Path]:
    """The classpath for a test's own brokers: PackagedKafka(kafka_jars)."""
    try:
        return kafka_classpath(print)
    except PipelineError as error:
        unavailable(str(error), required_by="PIPELINE_REQUIRE_SERVICES")


@pytest.fixture(scope="session")
def bootstrap_servers(services: LocalServices) -> str:
    return services.bootstrap_servers


@pytest.fixture
async def database_url(services: LocalServices, request: pytest.FixtureRequest) -> AsyncIterator[str]:
    """A fresh, empty database, named after the test and dropped with whatever is still connected to it."""
    test = re.sub(r"\W+", "_", request.node.name.lower())[:48].strip("_")
    name = f"{test}_{os.getpid()}"  # at most 63 bytes, PostgreSQL's limit for a name
    server = await asyncpg.connect(services.database_url)
    try:
        await server.execute(f'create database "{name}"')
        yield urlsplit(services.database_url)._replace(path=f"/{name}").geturl()
        await server.execute(f'drop database "{name}" with (force)')
    finally:
        await server.close()


@pytest.fixture
async def deploy(bootstrap_servers: str, database_url: str, tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Make a pipeline for this test alone: `await deploy(window_seconds=1)`; its processes end with the test.

    `topic_configs`, by role, override what topics/ declares.
    """
    made: list[Deployment] = []

    async def make(*, topic_configs: dict[str, dict[str, str]] | None = None, **settings: Any) -> Deployment:
        deployment = Deployment(bootstrap_servers, database_url, tmp_path, **settings)
        made.append(deployment)
        await deployment.prepare(topic_configs or {})
        return deployment

    yield make
    for deployment in made:
        deployment.close()
