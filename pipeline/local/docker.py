"""Kafka and Postgres in containers, by testcontainers: what tests prefer if a Docker engine answers."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from typing import Any

from pipeline.errors import ConfigError, ServiceUnavailable

KAFKA_IMAGE = "confluentinc/cp-kafka:8.1.1"  # testcontainers' KafkaContainer can't drive apache/kafka
POSTGRES_IMAGE = "postgres:17-alpine"

_ENGINE_SECONDS = 5

# As for the packaged broker, so that tests meet the same rules on both.
_KAFKA_ENVIRONMENT = {
    "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
    "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
    "KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS": "1000",
    "KAFKA_NUM_PARTITIONS": "8",
    "KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS": "4",
    "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
    "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
    "KAFKA_TRANSACTION_STATE_LOG_NUM_PARTITIONS": "4",
}


def docker_answers() -> bool:
    """Tell whether a Docker engine answers; False as well if its Python client is not installed."""
    try:
        import docker
    except ImportError:
        return False
    try:
        if not _socket_accepts(docker.utils.parse_host(os.environ.get("DOCKER_HOST"))):
            return False
        client = docker.from_env(timeout=_ENGINE_SECONDS)
    except docker.errors.DockerException:
        return False
    try:
        return bool(client.ping())
    except (docker.errors.DockerException, OSError):
        return False
    finally:
        client.close()


def _socket_accepts(host: str) -> bool:
    """Tell whether a Unix socket accepts a connection: if not, docker's client would leave a socket open."""
    scheme, _, path = host.partition("://")
    if scheme != "http+unix":
        return True
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_ENGINE_SECONDS)
        return probe.connect_ex(path) == 0


def start_kafka_container(stack: ExitStack) -> str:
    """Return the bootstrap servers of a container that ends with the stack.

    Raises:
        ConfigError: testcontainers is not installed.
        ServiceUnavailable: no engine answers, or the container did not come up.
    """
    _require_engine()
    from testcontainers.community.kafka import KafkaContainer

    container = KafkaContainer(KAFKA_IMAGE).with_kraft()
    for name, value in _KAFKA_ENVIRONMENT.items():
        container.with_env(name, value)
    _start(container, KAFKA_IMAGE, stack)
    return str(container.get_bootstrap_server())


def start_postgres_container(stack: ExitStack) -> str:
    """Return the URL of a container that ends with the stack.

    Raises:
        ConfigError: testcontainers is not installed.
        ServiceUnavailable: no engine answers, or the container did not come up.
    """
    _require_engine()
    from testcontainers.community.postgres import PostgresContainer

    container = PostgresContainer(POSTGRES_IMAGE, driver=None)
    _start(container, POSTGRES_IMAGE, stack)
    return str(container.get_connection_url())


def _require_engine() -> None:
    try:
        import testcontainers  # noqa: F401 - only to see whether it is installed
    except ImportError:
        raise ConfigError(
            "services from Docker need testcontainers: pip install 'agent-metadata-pipeline[dev]'"
        ) from None
    if not docker_answers():
        raise ServiceUnavailable("no Docker engine answers: start one, or set DOCKER_HOST")


def _start(container: Any, image: str, stack: ExitStack) -> None:
    stack.callback(container.stop)
    try:
        container.start()
    except Exception as error:  # testcontainers, docker and requests each raise their own
        reason = " ".join(str(error).split())[:200]
        raise ServiceUnavailable(f"{image} did not come up in Docker: {reason}") from error
