"""A cluster of three Kafka nodes, each broker and controller, whose nodes tests kill and start again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
        self._wait(numbers, lambda metadata: set(metadata.brokers) == numbers, f"each knows of {numbers}", seconds)

    def wait_known(self, topics: set[str], seconds: float = 60.0) -> None:
        """Return when each node knows all partitions' leaders of these topics: until then a client may hear of none."""

        def are_known(metadata: Any) -> bool:
            found = [metadata.topics[name] for name in topics & metadata.topics.keys()]
            leaders = [part.leader for topic in found for part in topic.partitions.values()]
            return len(found) == len(topics) and -1 not in leaders and all(topic.partitions for topic in found)

        self._wait(set(self.nodes), are_known, f"each knows {topics}", seconds)

    def leaders(self, topic: str) -> list[int]:
        """Return the node that leads each partition; -1 where none does."""
        partitions = self._admin().list_topics(topic, timeout=10).topics[topic].partitions
        return [partitions[number].leader for number in sorted(partitions)]

    def _wait(self, numbers: set[int], holds: Callable[[Any], bool], what: str, seconds: float) -> None:
        """Return when something holds in what each of these nodes says: one may know before the others do."""
        deadline = time.monotonic() + seconds
        for number in numbers:
            address = self.nodes[number].bootstrap_servers
            while not holds(AdminClient({"bootstrap.servers": address, "log_level": 0}).list_topics(timeout=10)):
                assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
                time.sleep(0.1)

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
