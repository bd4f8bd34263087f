"""A cluster of three Kafka nodes, each broker and controller, whose nodes tests kill and start again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiokafka.cluster import ClusterMetadata
from aiokafka.conn import create_conn
from aiokafka.protocol.metadata import MetadataRequest
from confluent_kafka import Consumer, TopicPartition
from confluent_kafka.admin import AdminClient

from pipeline.local import PackagedKafka

# Kafka's own topics survive the loss of a node, as its defaults have it; new topics have its default of one replica.
_SETTINGS = {
    "offsets.topic.replication.factor": "3",
    "transaction.state.log.replication.factor": "3",
    "transaction.state.log.min.isr": "2",
    "share.coordinator.state.topic.replication.factor": "3",
    "share.coordinator.state.topic.min.isr": "2",
}
_HEAP_MEGABYTES = 384


@dataclass
class KafkaCluster:
    """`nodes` by node id, from 1."""

    nodes: dict[int, PackagedKafka]

    @property
    def bootstrap_servers(self) -> str:
        """Addresses of all nodes."""
        return ",".join(node.bootstrap_servers for node in self.nodes.values())

    def wait_alive(self, numbers: set[int], seconds: float = 60.0) -> None:
        """Return when each of these nodes knows of all of them, and of no others; a killed one is missed after seconds.

        Only then is it the same for a client which of them answers it: topics get as many replicas as it knows nodes.
        """
        self._wait(
            numbers, lambda seen: {node.nodeId for node in seen.brokers()} == numbers, f"{numbers} alive", seconds
        )

    def wait_known(self, topics: set[str], seconds: float = 60.0) -> None:
        """Return when each node knows the leaders of these topics: until then a client may hear that there are none."""

        def are_known(seen: ClusterMetadata) -> bool:
            led = {name: seen.available_partitions_for_topic(name) for name in topics}
            return all(led[name] and led[name] == seen.partitions_for_topic(name) for name in topics)

        self._wait(set(self.nodes), are_known, f"the leaders of {topics}", seconds)

    def wait_for_groups(self, seconds: float = 60.0) -> None:
        """Return when groups have coordinators: the first question about one creates Kafka's topic of their offsets.

        A consumer asks it: AdminClient, which asks for a group's members, may end the process if it is asked too early
        (librdkafka's issue 4605).
        """
        consumer = Consumer({"bootstrap.servers": self.bootstrap_servers, "group.id": "nobody", "log_level": 0})
        try:
            consumer.committed([TopicPartition("any", 0)], timeout=seconds)
        finally:
            consumer.close()
        self.wait_known({"__consumer_offsets"}, seconds)

    def leaders(self, topic: str) -> list[int]:
        """Return the node that leads each partition; -1 where none does."""
        partitions = self._admin().list_topics(topic, timeout=10).topics[topic].partitions
        return [partitions[number].leader for number in sorted(partitions)]

    def _wait(self, numbers: set[int], holds: Callable[[ClusterMetadata], bool], what: str, seconds: float) -> None:
        """Return when something holds in what each of these nodes says: one may know before the others do."""
        deadline = time.monotonic() + seconds
        for number in numbers:
            while not holds(asyncio.run(_seen_by(self.nodes[number].bootstrap_servers))):
                assert time.monotonic() < deadline, f"node {number} does not know after {seconds:g} s: {what}"
                time.sleep(0.1)

    def _admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})


async def _seen_by(address: str) -> ClusterMetadata:
    """Ask one node: librdkafka's clients ask whichever they like, however few they are given."""
    host, _, port = address.partition(":")
    connection = await create_conn(host, int(port))
    try:
        seen = ClusterMetadata()
        seen.update_metadata(await connection.send(MetadataRequest(None)))
        return seen
    finally:
        connection.close()


@contextmanager
def kafka_cluster(jars: Sequence[Path]) -> Iterator[KafkaCluster]:
    """Run three nodes; return when all are alive."""
    with ExitStack() as stack:
        nodes = {}
        for number in (1, 2, 3):
            settings = {**_SETTINGS, "node.id": str(number)}
            nodes[number] = PackagedKafka(jars, settings=settings, heap_megabytes=_HEAP_MEGABYTES)
            stack.callback(nodes[number].close)
        voters = ",".join(f"{number}@{node.address('CONTROLLER')}" for number, node in nodes.items())
        for node in nodes.values():
            node.settings["controller.quorum.voters"] = voters
            node.cluster_id = nodes[1].cluster_id
        with ThreadPoolExecutor(len(nodes)) as threads:  # none is ready before two have elected a controller
            list(threads.map(PackagedKafka.start, nodes.values()))
        cluster = KafkaCluster(nodes)
        cluster.wait_alive(set(nodes))
        cluster.wait_for_groups()
        yield cluster
