"""Read and change a cluster's topics, offsets and groups, with this package's errors and nothing on stderr."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from confluent_kafka import Consumer, IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType

from pipeline.errors import ServiceUnavailable, TopicMismatch
from pipeline.kafka.errors import SILENCE, LastError, code_of

# What brokers without topic ids report (Kafka's Uuid.ZERO_UUID).
_NO_TOPIC_ID: Final = "AAAAAAAAAAAAAAAAAAAAAA"
# What librdkafka's mock cluster calls itself (rdkafka_mock.c). It is not recognised by its lack of a controller: a real
# cluster between two controllers must not be mistaken for it, or progress would be kept by topic names from then on.
_EMBEDDED_CLUSTER_ID: Final = "mockCluster"
_POLL_SECONDS: Final = 0.05
# A wait for the cluster is cut into turns of this length, each followed by a check of why nobody has answered.
_TURN_SECONDS: Final = 1.0
# Answers to CreateTopics that say nothing about the topic. KafkaError.retriable() knows of transactions only.
_TRY_AGAIN: Final = (*SILENCE, KafkaError.NOT_CONTROLLER, KafkaError.REQUEST_TIMED_OUT)
# Answers while a group's coordinator is being elected, as on a cluster whose first group this is.
_ELECTING: Final = (
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
)


# What makes up Offsets, in its order.
_OFFSETS: Final = (
    (OffsetSpec.earliest(), IsolationLevel.READ_UNCOMMITTED),
    (OffsetSpec.latest(), IsolationLevel.READ_COMMITTED),
    (OffsetSpec.latest(), IsolationLevel.READ_UNCOMMITTED),
)


class Cluster(NamedTuple):
    """What a cluster holds: its topics with their numbers of partitions and of replicas, and how many brokers it has.

    A broker that is down counts if a topic is on it. `is_embedded`: librdkafka's mock cluster, which can't create,
    describe or delete topics.
    """

    partitions: dict[str, int]
    replication: dict[str, int]
    brokers: int
    is_embedded: bool


class Offsets(NamedTuple):
    """Where a partition begins and ends: its earliest offset, its end for consumers, and the next to be appended.

    `stable` is Kafka's last stable offset: the first open transaction begins there; without one it equals `end`.
    """

    earliest: int
    stable: int
    end: int

    @property
    def uncommitted(self) -> int:
        """How many offsets are in or behind an open transaction."""
        return self.end - self.stable


class KafkaAdmin:
    """An AdminClient whose errors say why Kafka is unavailable.

    All methods raise ServiceUnavailable if Kafka does not answer within `timeout_s` seconds. `topic_id` and `offsets`,
    which roles call while they run, are coroutines: a thread that waits for Kafka would delay the process's exit. The
    others block.
    """

    def __init__(self, client_config: Mapping[str, Any]) -> None:
        self._config = client_config
        self._servers = client_config.get("bootstrap.servers", "")
        self._connect()

    def _connect(self) -> None:
        self._last_error = LastError(self._config)
        self._client: Any = AdminClient({**self._config, "error_cb": self._last_error.note, "logger": _Silent()})

    def __enter__(self) -> KafkaAdmin:
        return self

    def __exit__(self, *_: object) -> None:
        self._client = None  # its thread ends with it

    def cluster(self, timeout_s: float) -> Cluster:
        """Read all topics; those that this client may not see, or that have no partitions yet, are missing."""
        metadata = self._topics(timeout_s)
        replicas = {
            name: [partition.replicas for partition in topic.partitions.values()]
            for name, topic in metadata.topics.items()
            if topic.partitions
        }
        partitions = {name: len(lists) for name, lists in replicas.items()}
        replication = {name: min(map(len, lists)) for name, lists in replicas.items()}
        brokers = set(metadata.brokers).union(*(ids for lists in replicas.values() for ids in lists))
        return Cluster(partitions, replication, len(brokers), str(metadata.cluster_id).startswith(_EMBEDDED_CLUSTER_ID))

    def _topics(self, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > _TURN_SECONDS:
            try:
                return self._client.list_topics(timeout=min(_TURN_SECONDS, left))
            except KafkaException as error:
                self._client.poll(0)  # delivers librdkafka's last error
                if code_of(error) not in SILENCE or self._last_error.is_refusal:
                    raise self._unavailable(error) from error
        return self._ask(lambda: self._client.list_topics(timeout=max(left, _TURN_SECONDS / 10)))

    def touch(self, names: Iterable[str], timeout_s: float) -> None:
        """Ask for topics by name: the embedded broker creates those it is asked for."""
        for name in names:
            self._ask(partial(self._client.list_topics, name, timeout=timeout_s))

    def create(self, topics: list[NewTopic], timeout_s: float) -> list[str]:
        """Create topics; return the names of those that nobody else created in the meantime.

        Raises:
            TopicMismatch: Kafka refuses one; the others may exist.
        """
        futures = self._client.create_topics(topics, request_timeout=timeout_s)
        return [name for name, future in futures.items() if self._is_created(name, future.result)]

    def _is_created(self, name: str, result: Callable[[], Any]) -> bool:
        try:
            result()
        except KafkaException as error:
            reason = error.args[0]
            if reason.code() == KafkaError.TOPIC_ALREADY_EXISTS:
                return False
            if reason.code() in _TRY_AGAIN:
                raise self._unavailable(error) from error
            raise TopicMismatch(
                f"Kafka refused to create {name}: {reason.str().rstrip('.')}; change its declaration or the cluster"
            ) from error
        return True

    def wait_until_shown(self, names: Iterable[str], timeout_s: float) -> None:
        """Wait until the cluster lists the topics: brokers may learn of one only after its creation is acknowledged."""
        deadline = time.monotonic() + timeout_s
        while hidden := sorted(set(names) - self.cluster(timeout_s).partitions.keys()):
            if time.monotonic() > deadline:
                raise ServiceUnavailable(
                    f"Kafka at {self._servers} does not show {', '.join(hidden)} {timeout_s:g} s after creation: "
                    f"check that its brokers are up and that this user may describe topics, and try again"
                )
            time.sleep(_POLL_SECONDS)

    def delete(self, names: Sequence[str], timeout_s: float) -> None:
        """Delete topics; those that don't exist are fine."""
        futures = self._client.delete_topics(list(names), request_timeout=timeout_s)
        for future in futures.values():
            try:
                future.result()
            except KafkaException as error:
                if code_of(error) != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise self._unavailable(error) from error

    def configs(self, names: Iterable[str], timeout_s: float) -> dict[str, dict[str, str]]:
        """Read the configuration of topics, by topic; Kafka's own names and values as text."""
        resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
        if not resources:
            return {}
        futures = self._client.describe_configs(resources, request_timeout=timeout_s)
        entries = {resource.name: self._ask(future.result) for resource, future in futures.items()}
        return {name: {key: entry.value for key, entry in config.items()} for name, config in entries.items()}

    def topic_ids(self, names: Iterable[str], timeout_s: float) -> dict[str, str]:
        """Read the ids that Kafka gave these incarnations of topics; `name:` and the name where a broker has no ids."""
        futures = self._client.describe_topics(TopicCollection(list(names)), request_timeout=timeout_s)
        ids = {name: str(self._ask(future.result).topic_id) for name, future in futures.items()}
        return {name: _known_topic_id(name, topic_id) for name, topic_id in ids.items()}

    async def topic_id(self, name: str, timeout_s: float) -> str | None:
        """Read the id of a topic's incarnation, as `topic_ids` does; None if there is no such topic now."""
        (future,) = self._client.describe_topics(TopicCollection([name]), request_timeout=timeout_s).values()
        try:
            topic_id = str((await asyncio.wrap_future(future)).topic_id)
        except KafkaException as error:
            if code_of(error) == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return None
            raise self._reconnect_after(error) from error
        return _known_topic_id(name, topic_id)

    async def offsets(self, topic: str, partitions: Iterable[int], timeout_s: float) -> dict[int, Offsets]:
        """Read the offsets of each partition, from the brokers that lead them."""
        assignment = [TopicPartition(topic, partition) for partition in partitions]
        answers = [
            self._ask(
                partial(
                    self._client.list_offsets,
                    dict.fromkeys(assignment, spec),
                    isolation_level=isolation,
                    request_timeout=timeout_s,
                )
            )
            for spec, isolation in _OFFSETS
        ]
        try:
            earliest, stable, ends = [
                {item.partition: (await asyncio.wrap_future(future)).offset for item, future in answer.items()}
                for answer in answers
            ]
            if min((*earliest.values(), *stable.values(), *ends.values()), default=0) < 0:  # librdkafka's timeout
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        except KafkaException as error:
            raise self._reconnect_after(error) from error
        return {
            number: Offsets(earliest[number], stable[number], max(stable[number], end)) for number, end in ends.items()
        }

    def committed(self, group: str, topic: str, partitions: int, timeout_s: float) -> dict[int, int]:
        """Read a group's committed offsets, by partition, without joining it; partitions without one are missing."""
        self.members(group, timeout_s)  # without rights to the group, what follows would only time out
        # Not by list_consumer_group_offsets: librdkafka crashes on NOT_COORDINATOR there (its issue 5040).
        consumer = Consumer({**self._config, "group.id": group, "enable.auto.commit": False, "logger": _Silent()})
        try:
            assignment = [TopicPartition(topic, number) for number in range(partitions)]
            committed = self._ask_coordinator(lambda: consumer.committed(assignment, timeout_s), timeout_s)
        finally:
            consumer.close()
        return {item.partition: item.offset for item in committed if item.offset >= 0}

    def members(self, group: str, timeout_s: float) -> int:
        """Count the members of a consumer group; 0 if there is no such group."""

        def count() -> int:
            (future,) = self._client.describe_consumer_groups([group], request_timeout=timeout_s).values()
            try:
                return len(future.result().members)
            except KafkaException as error:
                if code_of(error) == KafkaError.GROUP_ID_NOT_FOUND:
                    return 0
                raise

        return int(self._ask_coordinator(count, timeout_s))

    def _ask_coordinator(self, question: Callable[[], Any], timeout_s: float) -> Any:
        """Ask a group's coordinator, waiting while one is elected."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return question()
            except KafkaException as error:
                if code_of(error) not in _ELECTING or time.monotonic() > deadline:
                    raise self._unavailable(error) from error
            time.sleep(_POLL_SECONDS)

    def _ask(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except KafkaException as error:
            raise self._unavailable(error) from error

    def _reconnect_after(self, error: KafkaException) -> ServiceUnavailable:
        """Return what to raise; if nobody answered, replace the client before the next request.

        After half a minute of a broker's silence, librdkafka's client (2.16) may wait forever for its controller
        although the broker answers everybody else. A new one takes half a millisecond; other requests to the old one
        end with _DESTROY.
        """
        unavailable = self._unavailable(error)
        if code_of(error) in SILENCE and code_of(error) != KafkaError._DESTROY:
            self._connect()
        return unavailable

    def _unavailable(self, error: KafkaException) -> ServiceUnavailable:
        self._client.poll(0)  # delivers librdkafka's last error, which says why
        return self._last_error.unavailable(error)


def _known_topic_id(name: str, topic_id: str) -> str:
    return topic_id_by_name(name) if topic_id == _NO_TOPIC_ID else topic_id


def topic_id_by_name(name: str) -> str:
    """Return the stand-in for a topic's id where a broker has none; Kafka's ids have no colon."""
    return f"name:{name}"


class _Silent:
    """Drops librdkafka's log lines, which would repeat on stderr what the error says."""

    def log(self, *_: object) -> None:
        """Do nothing."""
