"""Topics as code: create what topics/*.toml declares, and say where the cluster disagrees."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import structlog
from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, ResourceType

from pipeline.data_files import data_dir
from pipeline.errors import ServiceUnavailable, TopicMismatch

_REQUEST_SECONDS: Final = 10.0
# What brokers without topic ids report (Kafka's Uuid.ZERO_UUID).
_NO_TOPIC_ID: Final = "AAAAAAAAAAAAAAAAAAAAAA"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class TopicSpec:
    """One topic as declared; `why` explains each choice, `config` holds Kafka's own names and texts."""

    role: str
    name: str
    key: str
    partitions: int
    replication: int
    config: Mapping[str, str]
    why: Mapping[str, str]


@dataclass(frozen=True)
class TopicFacts:
    """One topic as it is; `topic_id` names this incarnation of it."""

    name: str
    topic_id: str
    partitions: int


@dataclass(frozen=True)
class Difference:
    """Where a topic is not as declared."""

    topic: str
    field: str
    declared: str
    actual: str


def load_topic_specs(*, names: Mapping[str, str] | None = None, partitions: int | None = None) -> dict[str, TopicSpec]:
    """Read the declarations, by role: events, batches, dead_letter.

    `names` renames topics by role; `partitions` counts for events and batches alike.
    """
    specs = {}
    for file in sorted(data_dir("topics").glob("*.toml")):
        declared = tomllib.loads(file.read_text(encoding="utf-8"))
        spec = TopicSpec(
            role=declared["role"],
            name=declared["name"],
            key=declared["key"],
            partitions=declared["partitions"],
            replication=declared["replication"],
            config={name: str(value) for name, value in declared["config"].items()},
            why=declared["why"],
        )
        if names and spec.role in names:
            spec = replace(spec, name=names[spec.role])
        if partitions is not None and spec.role != "dead_letter":
            spec = replace(spec, partitions=partitions)
        specs[spec.role] = spec
    return specs


def create_topics(client_config: Mapping[str, Any], specs: Mapping[str, TopicSpec]) -> list[str]:
    """Create the topics that are missing and return their names; existing ones are left alone.

    Raises:
        ServiceUnavailable: Kafka did not answer.
        TopicMismatch: Kafka refuses a topic.
    """
    with _Admin(client_config) as admin:
        existing = admin.existing(_REQUEST_SECONDS)
        missing = [spec for spec in specs.values() if spec.name not in existing]
        for spec in missing:
            admin.create(spec)
    return [spec.name for spec in missing]


def delete_topics(client_config: Mapping[str, Any], specs: Mapping[str, TopicSpec]) -> None:
    """Delete these topics with all they hold; those that don't exist are fine.

    Raises:
        ServiceUnavailable: Kafka did not answer.
    """
    with _Admin(client_config) as admin:
        for spec in specs.values():
            admin.delete(spec.name)


def diff_topics(client_config: Mapping[str, Any], specs: Mapping[str, TopicSpec]) -> list[Difference]:
    """Compare the cluster with the declarations; no differences, no items.

    Raises:
        ServiceUnavailable: Kafka did not answer.
    """
    differences = []
    with _Admin(client_config) as admin:
        existing = admin.existing(_REQUEST_SECONDS)
        for spec in specs.values():
            if spec.name not in existing:
                differences.append(Difference(spec.name, "topic", "exists", "missing"))
                continue
            if existing[spec.name] != spec.partitions:
                differences.append(Difference(spec.name, "partitions", str(spec.partitions), str(existing[spec.name])))
            actual = admin.config(spec.name)
            differences += [
                Difference(spec.name, name, declared, actual.get(name, "not set"))
                for name, declared in spec.config.items()
                if actual.get(name) != declared
            ]
    return differences


def require_topics(
    client_config: Mapping[str, Any], specs: Mapping[str, TopicSpec], *, timeout_s: float
) -> dict[str, TopicFacts]:
    """Check that the topics exist and fit together; return what they are, by role.

    Raises:
        TopicMismatch: one is missing, or events and batches have unequally many partitions.
        ServiceUnavailable: Kafka did not answer within the timeout.
    """
    with _Admin(client_config) as admin:
        existing = admin.existing(timeout_s)
        if missing := [spec.name for spec in specs.values() if spec.name not in existing]:
            raise TopicMismatch(f"the cluster lacks {', '.join(missing)}: run `agent-metadata topics create`")
        facts = {
            role: TopicFacts(spec.name, admin.topic_id(spec.name, timeout_s), existing[spec.name])
            for role, spec in specs.items()
        }
    require_equal_partitions(facts["events"], facts["batches"])
    return facts


def require_equal_partitions(events: TopicFacts, batches: TopicFacts) -> None:
    """Refuse a batches topic that can't mirror the events topic partition by partition.

    Raises:
        TopicMismatch: their numbers of partitions differ.
    """
    if events.partitions != batches.partitions:
        raise TopicMismatch(
            f"{events.name} has {events.partitions} partitions and {batches.name} has {batches.partitions}: "
            f"give both equally many (kafka-topics.sh --alter adds partitions)"
        )


class _Admin:
    """An AdminClient that keeps librdkafka's last complaint for the error message."""

    def __init__(self, client_config: Mapping[str, Any]) -> None:
        self._servers = client_config.get("bootstrap.servers", "")
        self._complaint = ""
        self._client = AdminClient({**client_config, "error_cb": self._keep, "logger": _Silent()})

    def __enter__(self) -> _Admin:
        return self

    def __exit__(self, *_: object) -> None:
        self._client = None  # its thread ends with it

    def existing(self, timeout_s: float) -> dict[str, int]:
        """Return all topics with their numbers of partitions."""
        metadata = self._metadata(timeout_s)
        return {name: len(topic.partitions) for name, topic in metadata.topics.items()}

    def has_controller(self, timeout_s: float) -> bool:
        """Tell whether there is anyone to create and describe topics; librdkafka's mock cluster has nobody."""
        metadata = self._metadata(timeout_s)
        return metadata.controller_id in metadata.brokers

    def _metadata(self, timeout_s: float) -> Any:
        try:
            return self._client.list_topics(timeout=timeout_s)
        except KafkaException as error:
            raise self._unavailable(error) from error

    def create(self, spec: TopicSpec) -> None:
        if not self.has_controller(_REQUEST_SECONDS):
            self._client.list_topics(spec.name, timeout=_REQUEST_SECONDS)  # the mock cluster makes what is asked for
            _log.warning("topic_made_by_the_broker", topic=spec.name, reason="it knows no CreateTopics")
            return
        topic = NewTopic(spec.name, spec.partitions, spec.replication, config=dict(spec.config))
        try:
            self._client.create_topics([topic], request_timeout=_REQUEST_SECONDS)[spec.name].result()
        except KafkaException as error:
            code = error.args[0].code()
            if code == KafkaError.TOPIC_ALREADY_EXISTS:
                return
            if error.args[0].retriable() or code in (KafkaError._TRANSPORT, KafkaError._TIMED_OUT):
                raise self._unavailable(error) from error
            raise TopicMismatch(f"Kafka refused to create {spec.name}: {error.args[0].str()}") from error

    def delete(self, name: str) -> None:
        """Delete a topic if it exists."""
        if not self.has_controller(_REQUEST_SECONDS):
            return
        try:
            self._client.delete_topics([name], request_timeout=_REQUEST_SECONDS)[name].result()
        except KafkaException as error:
            if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise self._unavailable(error) from error

    def config(self, name: str) -> dict[str, str]:
        resource = ConfigResource(ResourceType.TOPIC, name)
        try:
            entries = self._client.describe_configs([resource])[resource].result(_REQUEST_SECONDS)
        except (KafkaException, TimeoutError) as error:
            raise self._unavailable(error) from error
        return {key: entry.value for key, entry in entries.items()}

    def topic_id(self, name: str, timeout_s: float) -> str:
        """Return Kafka's id of this incarnation; a name stands in where the broker has no ids."""
        if not self.has_controller(timeout_s):
            return f"name:{name}"
        try:
            futures = self._client.describe_topics(TopicCollection([name]), request_timeout=timeout_s)
            topic_id = str(futures[name].result(timeout_s).topic_id)
        except (KafkaException, TimeoutError) as error:
            raise self._unavailable(error) from error
        return f"name:{name}" if topic_id == _NO_TOPIC_ID else topic_id

    def _unavailable(self, error: Exception) -> ServiceUnavailable:
        self._client.poll(0)  # brings librdkafka's complaint, which says why
        kafka_error = error.args[0] if error.args else error
        said = self._complaint or (kafka_error.str() if isinstance(kafka_error, KafkaError) else str(kafka_error))
        return ServiceUnavailable(
            f"Kafka at {self._servers} can't be reached: {said}; is it up, and the address right?"
        )

    def _keep(self, error: KafkaError) -> None:
        self._complaint = error.str()


class _Silent:
    """Takes librdkafka's log lines, which would say on stderr again what the error says."""

    def log(self, *_: object) -> None:
        """Do nothing."""
