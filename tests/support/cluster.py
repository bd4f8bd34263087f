"""A cluster of three Kafka nodes, each broker and controller, whose nodes tests kill and start again."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

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
        deadline = time.monotonic() + seconds
        for number in numbers:  # each node: one may know of the others before they know of it
            while (alive := self._alive_to(number)) != numbers:
                assert time.monotonic() < deadline, f"{alive} are alive after {seconds:g} s, not {numbers}"
                time.sleep(0.1)

    def leaders(self, topic: str) -> list[int]:
        """Return the node that leads each partition; -1 where none does."""
        partitions = self._admin().list_topics(topic, timeout=10).topics[topic].partitions
        return [partitions[number].leader for number in sorted(partitions)]

    def _alive_to(self, number: int) -> set[int]:
        """Return the ids of the nodes that one of them counts as alive."""
        address = self.nodes[number].bootstrap_servers
        answering = AdminClient({"bootstrap.servers": address, "log_level": 0})
        return set(answering.list_topics(timeout=10).brokers)

    def _admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})


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
        yield cluster
