"""Topics as code: create what topics/*.toml declares, report where the cluster differs, and notice recreation."""

from __future__ import annotations

import asyncio
import time
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import structlog
from confluent_kafka.admin import NewTopic

from pipeline.core.replication import MIN_INSYNC, Replication, Risk
from pipeline.data_files import data_dir
from pipeline.errors import ANSWER_SECONDS, ServiceUnavailable, TopicMismatch
from pipeline.kafka.admin import KafkaAdmin, topic_id_by_name

# Pause before a request that Kafka did not answer is repeated.
_RETRY_SECONDS: Final = 1.0
_MIN_ANSWER_SECONDS: Final = 0.1  # librdkafka refuses timeouts below a millisecond

# A broker's default.replication.factor, to Kafka.
_BROKERS_DEFAULT: Final = -1
_AUTO: Final = Replication()

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class TopicSpec:
    """One topic as declared; `config` has Kafka's own names and values as text, `why` the reason for each choice."""

    role: str
    name: str
    purpose: str
    key: str
    partitions: int
    replication: Replication
    config: Mapping[str, str]
    why: Mapping[str, str]


@dataclass(frozen=True)
class TopicFacts:
    """One topic as it exists; `topic_id` identifies this incarnation. `is_embedded`: its broker is for demos."""

    name: str
    topic_id: str
    partitions: int
    is_embedded: bool = False


@dataclass(frozen=True)
class Difference:
    """One respect in which a topic differs from its declaration."""

    topic: str
    field: str
    declared: str
    actual: str


def load_topic_specs(
    *,
    names: Mapping[str, str] | None = None,
    partitions: int | None = None,
    replication: Replication = _AUTO,
) -> dict[str, TopicSpec]:
    """Read the declarations, by role: events, batches, dead_letter.

    `names` renames topics by role; `partitions` applies to both events and batches, `replication` to all.
    """
    specs = {}
    for file in sorted(data_dir("topics").glob("*.toml")):
        declared = tomllib.loads(file.read_text(encoding="utf-8"))
        spec = TopicSpec(
            role=declared["role"],
            name=declared["name"],
            purpose=declared["purpose"],
            key=declared["key"],
            partitions=declared["partitions"],
            replication=replication,
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
    """Create the missing topics; return the names of those that this call created. Existing ones are left alone.

    Guarantee: idempotent, safe to run concurrently; on return the cluster lists all the topics. The embedded broker
    chooses partitions and configuration itself, which is logged.

    Raises:
        ServiceUnavailable: Kafka did not answer, or did not list a topic within 10 s of its creation.
        TopicMismatch: Kafka refuses a topic.
        ConfigError: the replication that is set does not fit the cluster.
    """
    with KafkaAdmin(client_config) as admin:
        cluster = admin.cluster(ANSWER_SECONDS)
        missing = {spec.name: spec for spec in specs.values() if spec.name not in cluster.partitions}
        if not missing:
            return []
        if cluster.is_embedded:
            _log.warning(
                "topics_created_by_the_broker", topics=list(missing), reason="it does not support CreateTopics"
            )
            admin.touch(missing, ANSWER_SECONDS)
            created = list(missing)
        else:
            created = admin.create([_new_topic(spec, cluster.brokers) for spec in missing.values()], ANSWER_SECONDS)
        admin.wait_until_shown(missing, ANSWER_SECONDS)
    return created


def delete_topics(client_config: Mapping[str, Any], specs: Mapping[str, TopicSpec]) -> None:
    """Delete these topics and all their records; missing ones are fine. The embedded broker keeps them.

    Raises:
        ServiceUnavailable: Kafka did not answer.
    """
    with KafkaAdmin(client_config) as admin:
        if not admin.cluster(ANSWER_SECONDS).is_embedded:
            admin.delete([spec.name for spec in specs.values()], ANSWER_SECONDS)


def diff_topics(client_config: Mapping[str, Any], specs: Mapping[str, TopicSpec]) -> list[Difference]:
    """List where the cluster differs from the declarations; empty if it doesn't.

    The embedded broker's configuration and replication are not compared: they can't be read, or mean nothing.

    Raises:
        ServiceUnavailable: Kafka did not answer.
    """
    with KafkaAdmin(client_config) as admin:
        cluster = admin.cluster(ANSWER_SECONDS)
        existing = [spec.name for spec in specs.values() if spec.name in cluster.partitions]
        configs = {} if cluster.is_embedded else admin.configs(existing, ANSWER_SECONDS)
    differences = []
    for spec in specs.values():
        partitions = cluster.partitions.get(spec.name)
        if partitions is None:
            differences.append(Difference(spec.name, "topic", "exists", "missing"))
        elif partitions != spec.partitions:
            differences.append(Difference(spec.name, "partitions", str(spec.partitions), str(partitions)))
        if spec.name in configs:
            config = configs[spec.name]
            actual = Replication(cluster.replication[spec.name], _min_insync(config))
            different = spec.replication.differences(actual, cluster.brokers)
            differences += [Difference(spec.name, *item) for item in different]
            differences += _config_differences(spec, config)
    return differences


def find_risks(client_config: Mapping[str, Any], specs: Mapping[str, TopicSpec]) -> list[Risk]:
    """List which topics would lose records with one broker; none on the embedded broker.

    Raises:
        ServiceUnavailable: Kafka did not answer.
    """
    with KafkaAdmin(client_config) as admin:
        cluster = admin.cluster(ANSWER_SECONDS)
        if cluster.is_embedded:
            return []
        if cluster.brokers == 1:
            return [Risk("Kafka has one broker: records that are not in Postgres yet are lost with it", False)]
        existing = [spec for spec in specs.values() if spec.name in cluster.partitions]
        risks, configs = [], {}
        try:
            configs = admin.configs([spec.name for spec in existing], ANSWER_SECONDS)
        except ServiceUnavailable as error:
            risks.append(Risk(f"{MIN_INSYNC} could not be read, which needs DESCRIBE_CONFIGS: {error}", False))
    for spec in existing:
        actual = Replication(cluster.replication[spec.name], _min_insync(configs.get(spec.name, {})))
        if risk := spec.replication.risk(spec.name, actual, cluster.brokers):
            risks.append(risk)
    return risks


async def require_topics(
    client_config: Mapping[str, Any], specs: Mapping[str, TopicSpec], *, timeout_s: float = ANSWER_SECONDS
) -> dict[str, TopicFacts]:
    """Check that the topics exist and fit together; return their facts, by role.

    Raises:
        TopicMismatch: one is missing, or events and batches differ in their number of partitions.
        ServiceUnavailable: Kafka did not answer all requests within `timeout_s` seconds.
    """
    return await asyncio.to_thread(_require_topics, client_config, specs, timeout_s)


def _require_topics(
    client_config: Mapping[str, Any], specs: Mapping[str, TopicSpec], timeout_s: float
) -> dict[str, TopicFacts]:
    deadline = time.monotonic() + timeout_s
    with KafkaAdmin(client_config) as admin:
        cluster = admin.cluster(timeout_s)
        names = [spec.name for spec in specs.values()]
        if missing := [name for name in names if name not in cluster.partitions]:
            raise TopicMismatch(
                f"the cluster lacks {', '.join(missing)}, or hides it from a user without DESCRIBE: "
                f"run `agent-metadata topics create`"
            )
        if cluster.is_embedded:
            ids = {name: topic_id_by_name(name) for name in names}
        else:
            ids = admin.topic_ids(names, max(deadline - time.monotonic(), _MIN_ANSWER_SECONDS))
    facts = {
        role: TopicFacts(spec.name, ids[spec.name], cluster.partitions[spec.name], cluster.is_embedded)
        for role, spec in specs.items()
    }
    if {"events", "batches"} <= facts.keys():
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
            f"give both the same number (kafka-topics.sh --alter adds partitions)"
        )


class Incarnation:
    """Knows which incarnation of a topic exists now, by Kafka's topic id: a recreated topic has another one.

    `ask` reads the id; it raises ServiceUnavailable if Kafka does not answer.
    """

    def __init__(self, topic: str, ask: Callable[[], Awaitable[str | None]]) -> None:
        self._topic = topic
        self._ask = ask
        self._asking: asyncio.Task[str | None] | None = None
        self._next: asyncio.Task[str | None] | None = None

    @classmethod
    def of(cls, topic: TopicFacts, admin: KafkaAdmin) -> Self:
        """Make one that asks `admin`, or remembers the id of an embedded broker's topic, as it deletes none."""

        async def ask() -> str | None:
            return topic.topic_id if topic.is_embedded else await admin.topic_id(topic.name, ANSWER_SECONDS)

        return cls(topic.name, ask)

    async def topic_id(self) -> str | None:
        """Return the topic's id now, waiting while Kafka is unavailable; None: there is no such topic.

        Guarantee: Kafka is asked after this call began. So what was read before it is of the incarnation in the answer,
        or of an earlier one. Concurrent calls share the next request.
        """
        if self._next is None:
            self._next = asyncio.create_task(self._ask_after(self._asking))
        return await asyncio.shield(self._next)

    async def _ask_after(self, asking: asyncio.Task[str | None] | None) -> str | None:
        if asking is not None:
            await asyncio.wait([asking])
        self._asking, self._next = self._next, None
        while True:
            try:
                return await self._ask()
            except ServiceUnavailable as error:
                _log.warning("waiting_for_topic_id", topic=self._topic, error=str(error))
                await asyncio.sleep(_RETRY_SECONDS)


def _new_topic(spec: TopicSpec, brokers: int) -> NewTopic:
    wanted = spec.replication.on(brokers)
    config = {**spec.config, **({MIN_INSYNC: str(wanted.min_insync)} if wanted.min_insync else {})}
    return NewTopic(spec.name, spec.partitions, wanted.factor or _BROKERS_DEFAULT, config=config)


def _min_insync(config: Mapping[str, str]) -> int | None:
    return int(config[MIN_INSYNC]) if MIN_INSYNC in config else None


def _config_differences(spec: TopicSpec, actual: Mapping[str, str]) -> list[Difference]:
    return [
        Difference(spec.name, name, declared, actual.get(name, "not set"))
        for name, declared in spec.config.items()
        if actual.get(name) != declared
    ]
