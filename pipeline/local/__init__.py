"""The whole pipeline on one machine, and where its Kafka and Postgres come from."""

from pipeline.local.docker import docker_answers
from pipeline.local.kafka import PackagedKafka, kafka_classpath
from pipeline.local.mock_broker import MockBroker
from pipeline.local.postgres import PackagedPostgres
from pipeline.local.services import LocalServices, ServicesKind, start_services

__all__ = [
    "LocalServices",
    "MockBroker",
    "PackagedKafka",
    "PackagedPostgres",
    "ServicesKind",
    "docker_answers",
    "kafka_classpath",
    "start_services",
]
