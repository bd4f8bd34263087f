"""A seeded load of reports, and the oracle: what Kafka accepted, and so what the table must hold."""

from __future__ import annotations

import random
import threading
import time
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from confluent_kafka import Producer

from pipeline.core.report import Entry, Report, encode_report
from pipeline.data_files import data_dir
from pipeline.formats.framing import frame
from pipeline.formats.registry import SchemaRegistry
from pipeline.formats.reports import write_avro_report
from tests.chaos.transactions import ABORTED, TransactionalProducer

POISON = "poison"  # a value with this ending is accepted, and is not expected in the table
SCHEMA_SECONDS = 0.3
KEYS = ("cpu", "disk", "load", "memory")
Table = dict[tuple[str, str], tuple[str, str, datetime]]


class Accepted(NamedTuple):
    """A report that Kafka acknowledged."""

    partition: int
    offset: int
    report: Report
    collected_at: datetime


@dataclass(frozen=True)
class LoadShape:
    """How much is reported, and how awkwardly; bounded by the scenario's length.

    `late`: this share of reports is up to 5 s older than the one before. `tied`: this share has the time of the one
    before, to the microsecond. `stuck`: this share of agents has a clock that stands still. Of the other agents one
    falls silent, and a new one begins, every `reports_an_agent` reports: so at any moment there are last values that no
    later report would replace if they were lost. `transactions`: half of the agents report in Kafka transactions, of
    which some are aborted. `schemas`: reports are in Avro, each in one of so many schemas; another one comes into use
    every 0.3 s.
    """

    agents: int = 120
    reports_a_second: float = 300.0
    late: float = 0.15
    tied: float = 0.2
    stuck: float = 0.2
    reports_an_agent: int = 4
    transactions: bool = False
    schemas: int = 0


class Load:
    """Reports at a steady pace from a thread of its own; `pause` returns when all is acknowledged.

    `lasting` are the agents whose clocks stand still; they report to the end.

    Every value begins with the number of its report, "17 ..." of the 17th: of two values of a pair the later arrival
    has the higher one. So an old value is recognisable in the table, its audit and listeners, ties included.
    """

    def __init__(
        self, client_config: dict[str, Any], topic: str, shape: LoadShape, seed: int, registry_url: str = ""
    ) -> None:
        # Every second: a partition that was added, or a recreated topic, has to be used within the scenario.
        self._config = {
            **client_config,
            "log_level": 0,  # Kafka is down on purpose
            "enable.idempotence": True,
            "linger.ms": 5,
            "message.timeout.ms": 0,
            "partitioner": "murmur2",
            "topic.metadata.refresh.interval.ms": 1000,
        }
        self._topic = topic
        self._shape = shape
        self._dice = random.Random(seed)
        self._agents = [self._new_agent() for _ in range(shape.agents)]
        self.lasting = set(self._agents[: round(shape.stuck * shape.agents)])
        self._schema_ids = _register_schemas(registry_url, topic, shape.schemas) if shape.schemas else []
        self._times: dict[uuid.UUID, datetime] = {}
        self._accepted: dict[int, Accepted] = {}
        self._is_ending = threading.Event()
        self._thread: threading.Thread | None = None
        self._transactional: TransactionalProducer | None = None
        self.produced = 0
        self.ties = True  # off while an agent's reports may come from two partitions: their order is by time alone
        self.refused: list[str] = []

    @property
    def accepted(self) -> int:
        """How many reports Kafka has acknowledged."""
        return len(self._accepted)

    def start(self) -> None:
        self._is_ending.clear()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def pause(self, timeout_seconds: float = 90.0) -> None:
        """Stop reporting and wait for the last acknowledgement."""
        self._is_ending.set()
        if self._thread is not None:
            self._thread.join(timeout_seconds)
            assert not self._thread.is_alive(), "reports were not acknowledged: is Kafka still down?"
            self._thread = None

    def abandon(self) -> None:
        """Stop reporting, and wait for nothing."""
        self._is_ending.set()

    def report_new_agents(self, count: int, bad: int) -> None:
        """While paused, report each of `count` new agents once; `bad` of the values are POISON."""
        producer = Producer(self._config)
        poisoned = set(self._dice.sample(range(count), bad))
        for index in range(count):
            self.produced += 1
            value = POISON if index in poisoned else "fine"
            self._send(producer, self._new_agent(), ["cpu"], datetime.now(UTC), value)
            producer.poll(0)
        while producer.flush(1.0):
            pass

    def forget(self, deleted: dict[int, tuple[int, int]]) -> int:
        """Expect nothing from records that Kafka deleted unread, by partition [first, end); return their number."""
        lost = []
        for number, accepted in self._accepted.items():
            first, end = deleted.get(accepted.partition, (0, 0))
            if first <= accepted.offset < end:
                lost.append(number)
        for number in lost:
            del self._accepted[number]
        return len(lost)

    def expected(self) -> Table:
        """The newest accepted entry of each pair by the pipeline's rule: collected_at, ties by arrival."""
        newest: Table = {}
        for _, accepted in sorted(self._accepted.items()):
            for entry in accepted.report.entries:
                pair = (accepted.report.agent_id, entry.key)
                before = newest.get(pair)
                if before is None or accepted.collected_at >= before[2]:
                    newest[pair] = (entry.value, entry.error, accepted.collected_at)
        return newest

    def _run(self) -> None:
        producer = Producer(self._config)
        if self._shape.transactions and self._transactional is None:
            config = {name: value for name, value in self._config.items() if name != "message.timeout.ms"}
            transactional = {**config, "transactional.id": f"chaos-{uuid.uuid4()}"}
            self._transactional = TransactionalProducer(transactional, self._dice, self._accepted.update)
        started, sent = time.monotonic(), 0
        while not self._is_ending.is_set():
            due = started + sent / self._shape.reports_a_second
            producer.poll(max(0.0, min(0.05, due - time.monotonic())))
            if time.monotonic() >= due:
                self._report(producer)
                sent += 1
            if self._transactional is not None:
                self._transactional.end_when_due()
        if self._transactional is not None:
            self._transactional.end()
        while producer.flush(1.0):
            pass

    def _report(self, producer: Producer) -> None:
        self.produced += 1
        if self.produced % self._shape.reports_an_agent == 0:
            self._agents.append(self._new_agent())
            del self._agents[len(self.lasting)]
        agent_id = self._dice.choice(self._agents)
        keys = self._dice.sample(KEYS, self._dice.randint(1, len(KEYS)))
        moment, value = self._moment(agent_id), f"{self._dice.random():.6f}"
        if self._transactional is not None and agent_id.int % 2:
            self._send_in_transaction(self._transactional, agent_id, keys, moment, value)
        else:
            self._send(producer, agent_id, keys, moment, value)

    def _send_in_transaction(
        self, transactional: TransactionalProducer, agent_id: uuid.UUID, keys: list[str], moment: datetime, value: str
    ) -> None:
        transactional.begin()
        number, report = self._number(agent_id, keys, moment, ABORTED if transactional.is_doomed else value)
        transactional.produce(
            self._topic,
            self._encode(report),
            str(agent_id),
            lambda message: (number, Accepted(message.partition(), message.offset(), report, moment)),
        )

    def _number(self, agent_id: uuid.UUID, keys: list[str], moment: datetime, value: str) -> tuple[int, Report]:
        error = "" if self._dice.random() > 0.05 else "timed out"
        entries = [Entry(key, f"{self.produced} {value}", error) for key in keys]
        return self.produced, Report(str(agent_id), entries, moment)

    def _send(self, producer: Producer, agent_id: uuid.UUID, keys: list[str], moment: datetime, value: str) -> None:
        number, report = self._number(agent_id, keys, moment, value)

        def delivered(problem: Any, message: Any) -> None:
            if problem is not None:
                self.refused.append(problem.str())
            elif value != POISON:
                self._accepted[number] = Accepted(message.partition(), message.offset(), report, moment)

        producer.produce(self._topic, self._encode(report), str(agent_id), on_delivery=delivered)

    def _encode(self, report: Report) -> bytes:
        if not self._schema_ids:
            return encode_report(report)
        in_use = round(self.produced / self._shape.reports_a_second / SCHEMA_SECONDS) + 1
        return frame(self._dice.choice(self._schema_ids[:in_use]), write_avro_report(report))

    def _new_agent(self) -> uuid.UUID:
        return uuid.UUID(int=self._dice.getrandbits(128), version=4)

    def _moment(self, agent_id: uuid.UUID) -> datetime:
        """Never two reports of an agent with equal times unless `ties` is on."""
        now, before, luck = datetime.now(UTC), self._times.get(agent_id), self._dice.random()
        back = timedelta(microseconds=self._dice.randrange(1, 5_000_000))
        if before is None:
            moment = now
        elif self.ties and (agent_id in self.lasting or luck < self._shape.tied):
            return before
        elif luck > 1 - self._shape.late:
            return before - back
        else:
            moment = max(now, before + timedelta(microseconds=1))
        self._times[agent_id] = moment
        return moment


def _register_schemas(url: str, topic: str, count: int) -> list[int]:
    """Register schemas that differ in a comment; return their ids."""
    schema = (data_dir("topics") / "report.avsc").read_text(encoding="utf-8")
    texts = [schema.replace("What one agent", f"{number}: what one agent") for number in range(count)]
    with SchemaRegistry({"url": url}) as registry:
        return [registry.register(f"{topic}-value", "AVRO", text) for text in texts]
