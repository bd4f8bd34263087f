"""Ask a Kafka cluster about its topics and change them, with errors of ours and nothing on stderr."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic, OffsetSpec, ResourceType

from pipeline.errors import ServiceUnavailable, TopicMismatch
from pipeline.kafka.tls import why_certificate_refused

# What brokers without topic ids report (Kafka's Uuid.ZERO_UUID).
_NO_TOPIC_ID: Final = "AAAAAAAAAAAAAAAAAAAAAA"
# How librdkafka's mock cluster calls itself (rdkafka_mock.c). Not told by its lack of a controller: a real cluster
# that is between two controllers must not be taken for it, or progress would be kept by names from then on.
_EMBEDDED_CLUSTER_ID: Final = "mockCluster"
_POLL_SECONDS: Final = 0.05
# Codes that mean no broker answered; librdkafka's last complaint then says more than the code.
_SILENCE: Final = (
    KafkaError._TRANSPORT,
    KafkaError._TIMED_OUT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._RESOLVE,
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError._DESTROY,
)
# What doesn't get better by waiting: librdkafka would try again until the time is over.
_REFUSALS: Final = (KafkaError._AUTHENTICATION, KafkaError._SSL)
_TURN_SECONDS: Final = 1.0
# Answers to CreateTopics that say nothing about the topic. KafkaError.retriable() knows of transactions only.
_TRY_AGAIN: Final = (*_SILENCE, KafkaError.NOT_CONTROLLER, KafkaError.REQUEST_TIMED_OUT)

# Answers while a group's coordinator is being elected, as on a cluster whose first group this is.
_ELECTING: Final = (
    KafkaError.NOT_COORDINATOR,
    KafkaError.COORDINATOR_NOT_AVAILABLE,
    KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
)


class Cluster(NamedTuple):
    """What a cluster holds: its topics with their numbers of partitions.

    `is_embedded`: librdkafka's mock cluster, which has nobody to create, describe or delete a topic.
    """

    partitions: dict[str, int]
    is_embedded: bool


class KafkaAdmin:
    """An AdminClient that keeps librdkafka's last complaint for the error message.

    All methods raise ServiceUnavailable if Kafka does not answer within the `timeout_s` given. `topic_id` and
    `offsets`, which a role asks while it runs, are awaited: a thread that waits for Kafka would hold up the end of its
    process. The others block.
    """

    def __init__(self, client_config: Mapping[str, Any]) -> None:
        self._config = client_config
        self._servers = client_config.get("bootstrap.servers", "")
        self._protocol = client_config.get("security.protocol", "PLAINTEXT")
        self._ca_file = client_config.get("ssl.ca.location")
        self._complaint: KafkaError | None = None
        self._client = self._connect()

    def _connect(self) -> Any:
        return AdminClient({**self._config, "error_cb": self._keep, "logger": _Silent()})

    def __enter__(self) -> KafkaAdmin:
        return self

    def __exit__(self, *_: object) -> None:
        self._client = None  # its thread ends with it

    def cluster(self, timeout_s: float) -> Cluster:
        """Read all topics; one that this client may not see, or that has no partitions yet, is not there."""
        metadata = self._topics(timeout_s)
        partitions = {name: len(topic.partitions) for name, topic in metadata.topics.items() if topic.partitions}
        return Cluster(partitions, str(metadata.cluster_id).startswith(_EMBEDDED_CLUSTER_ID))

    def _topics(self, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while (left := deadline - time.monotonic()) > _TURN_SECONDS:
            try:
                return self._client.list_topics(timeout=min(_TURN_SECONDS, left))
            except KafkaException as error:
                self._client.poll(0)  # brings librdkafka's complaint
                if error.args[0].code() not in _SILENCE or self._is_refused():
                    raise self._unavailable(error) from error
        return self._asked(lambda: self._client.list_topics(timeout=max(left, _TURN_SECONDS / 10)))

    def touch(self, names: Iterable[str], timeout_s: float) -> None:
        """Ask for topics by name: the embedded broker makes what it is asked for."""
        for name in names:
            self._asked(partial(self._client.list_topics, name, timeout=timeout_s))

    def create(self, topics: list[NewTopic], timeout_s: float) -> list[str]:
        """Create topics and return the names of those that no one else had created meanwhile.

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
        """Return when the cluster lists the topics: a broker may learn of one after its creation is acknowledged."""
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
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise self._unavailable(error) from error

    def configs(self, names: Iterable[str], timeout_s: float) -> dict[str, dict[str, str]]:
        """Read the configuration of topics, by their names; Kafka's own keys and texts."""
        resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
        if not resources:
            return {}
        futures = self._client.describe_configs(resources, request_timeout=timeout_s)
        entries = {resource.name: self._asked(future.result) for resource, future in futures.items()}
        return {name: {key: entry.value for key, entry in found.items()} for name, found in entries.items()}

    def topic_ids(self, names: Iterable[str], timeout_s: float) -> dict[str, str]:
        """Read Kafka's ids of these incarnations of topics; `name:` and the name where a broker has no ids."""
        futures = self._client.describe_topics(TopicCollection(list(names)), request_timeout=timeout_s)
        ids = {name: str(self._asked(future.result).topic_id) for name, future in futures.items()}
        return {name: _known_topic_id(name, found) for name, found in ids.items()}

    async def topic_id(self, name: str, timeout_s: float) -> str | None:
        """Read Kafka's id of this incarnation of a topic, as `topic_ids` does; None if there is no such topic now."""
        (future,) = self._client.describe_topics(TopicCollection([name]), request_timeout=timeout_s).values()
        try:
            found = str((await asyncio.wrap_future(future)).topic_id)
        except KafkaException as error:
            if error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
                return None
            raise self._begin_anew(error) from error
        return _known_topic_id(name, found)

    async def offsets(self, topic: str, partitions: Iterable[int], timeout_s: float) -> dict[int, tuple[int, int]]:
        """Read the earliest offset and the end of each partition, from the brokers that lead them."""
        where = [TopicPartition(topic, partition) for partition in partitions]
        answers = [
            self._asked(partial(self._client.list_offsets, dict.fromkeys(where, spec), request_timeout=timeout_s))
            for spec in (OffsetSpec.earliest(), OffsetSpec.latest())
        ]
        try:
            earliest, ends = [
                {item.partition: (await asyncio.wrap_future(future)).offset for item, future in answer.items()}
                for answer in answers
            ]
            if min((*earliest.values(), *ends.values()), default=0) < 0:  # librdkafka's way to say that it timed out
                raise KafkaException(KafkaError(KafkaError._TIMED_OUT))
        except KafkaException as error:
            raise self._begin_anew(error) from error
        return {partition: (earliest[partition], end) for partition, end in ends.items()}

    def committed(self, group: str, topic: str, partitions: int, timeout_s: float) -> dict[int, int]:
        """Read a group's committed offsets; a partition without one is missing. The group is not joined."""
        self.members(group, timeout_s)  # without a right to the group, what follows would only time out
        # Not by list_consumer_group_offsets: librdkafka crashes on NOT_COORDINATOR there (its issue 5040).
        consumer = Consumer({**self._config, "group.id": group, "enable.auto.commit": False, "logger": _Silent()})
        try:
            wanted = [TopicPartition(topic, number) for number in range(partitions)]
            found = self._of_group(lambda: consumer.committed(wanted, timeout_s), timeout_s)
        finally:
            consumer.close()
        return {item.partition: item.offset for item in found if item.offset >= 0}

    def members(self, group: str, timeout_s: float) -> int:
        """Count the members of a consumer group; 0 if there is no such group."""

        def described() -> int:
            (future,) = self._client.describe_consumer_groups([group], request_timeout=timeout_s).values()
            try:
                return len(future.result().members)
            except KafkaException as error:
                if error.args[0].code() == KafkaError.GROUP_ID_NOT_FOUND:
                    return 0
                raise

        return int(self._of_group(described, timeout_s))

    def _of_group(self, question: Callable[[], Any], timeout_s: float) -> Any:
        """Ask a group's coordinator, waiting until there is one."""
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                return question()
            except KafkaException as error:
                if error.args[0].code() not in _ELECTING or time.monotonic() > deadline:
                    raise self._unavailable(error) from error
            time.sleep(_POLL_SECONDS)

    def _asked(self, question: Callable[[], Any]) -> Any:
        try:
            return question()
        except KafkaException as error:
            raise self._unavailable(error) from error

    def _begin_anew(self, error: KafkaException) -> ServiceUnavailable:
        """Have the next question asked by a new client, if nobody answered this one.

        After half a minute of a broker's silence librdkafka's (2.16) may wait for its controller for ever, although the
        broker answers everybody else. A new one takes half a millisecond; what else the old one was asked ends with
        _DESTROY.
        """
        unavailable = self._unavailable(error)
        if error.args[0].code() in _SILENCE and error.args[0].code() != KafkaError._DESTROY:
            self._client, self._complaint = self._connect(), None
        return unavailable

    def _unavailable(self, error: KafkaException) -> ServiceUnavailable:
        reason = error.args[0]
        if reason.code() == KafkaError._UNSUPPORTED_FEATURE:
            return ServiceUnavailable(f"Kafka at {self._servers} is too old for this, or an embedded broker, for demos")
        if reason.code() not in _SILENCE:
            answer = reason.str().removeprefix("Broker: ").rstrip(".")
            return ServiceUnavailable(
                f"Kafka at {self._servers} answered: {answer}; try again, and check this user's rights"
            )
        self._client.poll(0)  # brings librdkafka's complaint, which says why
        said = self._complaint or reason
        # Where in its protocol it stood helps those who write clients; what the certificate lacks, it doesn't say.
        text = re.sub(r" \(after \d+ms in state \w+\)", "", said.str())
        if said.code() == KafkaError._AUTHENTICATION:
            text = f"refuses this client: {text}; check AGENT_METADATA_KAFKA_SASL_*"
        elif said.code() == KafkaError._SSL and (why := why_certificate_refused(self._servers, self._ca_file)):
            text = f"can't be trusted: {why}"
        else:
            text = (
                f"can't be reached: {text}; is it up, and the address right? "
                f"Does it speak {self._protocol} (AGENT_METADATA_KAFKA_SECURITY_PROTOCOL)?"
            )
        return ServiceUnavailable(f"Kafka at {self._servers} {text}")

    def _keep(self, error: KafkaError) -> None:
        # "1/1 brokers are down" comes after the reason and says less.
        if self._complaint is None or error.code() != KafkaError._ALL_BROKERS_DOWN:
            self._complaint = error

    def _is_refused(self) -> bool:
        return self._complaint is not None and self._complaint.code() in _REFUSALS


def _known_topic_id(name: str, found: str) -> str:
    return topic_id_by_name(name) if found == _NO_TOPIC_ID else found


def topic_id_by_name(name: str) -> str:
    """Return what stands in for a topic's id where a broker has none; no id of Kafka's has a colon."""
    return f"name:{name}"


class _Silent:
    """Takes librdkafka's log lines, which would say on stderr again what the error says."""

    def log(self, *_: object) -> None:
        """Do nothing."""
