"""The whole pipeline on one machine, and where its Kafka and Postgres come from."""

from pipeline.local.docker import docker_answers
from pipeline.local.kafka import PackagedKafka, kafka_classpath
from pipeline.local.mock_broker import MockBroker
from pipeline.local.postgres import PackagedPostgres
from pipeline.local.registry import PackagedRegistry, registry_folder
from pipeline.local.services import LocalServices, ServicesKind, start_services

__all__ = [
    "LocalServices",
    "MockBroker",
    "PackagedKafka",
    "PackagedPostgres",
    "PackagedRegistry",
    "ServicesKind",
    "docker_answers",
    "kafka_classpath",
    "registry_folder",
    "start_services",
]
