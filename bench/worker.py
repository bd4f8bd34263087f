"""The worker against stock Faust and against a plain consumer loop, on the same topic.

Clocks start at the assignment of the partitions. Ours and the plain loop take all entries; stock Faust as many as it
can in 10 s. Ours includes the windows, and ends when Kafka has acknowledged every batch and the offsets are committed.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from typing import Any

from bench import harness
from bench.plain import Newest, assigned_consumer, fold

ENTRIES = 3_000_000
STOCK_SECONDS = 10.0
RUNS = 5


def stock(topic: str, servers: str, **_: Any) -> None:
    """Set a windowed table once per entry, as Faust's documentation shows it."""
    import faust

    app = faust.App(
        f"stock-{uuid.uuid4().hex[:8]}",
        broker=f"kafka://{servers}",
        store="memory://",
        topic_partitions=harness.PARTITIONS,
        topic_disable_leader=True,
        table_standby_replicas=0,
        consumer_auto_offset_reset="earliest",
        web_enabled=False,
    )
    events = app.topic(topic, value_serializer="json")
    table = app.Table("latest", partitions=harness.PARTITIONS).tumbling(5.0, expires=60.0)
    count, started = 0, 0.0

    async def set_each(stream: Any) -> None:
        nonlocal count, started
        async for report in stream:
            started = started or time.perf_counter()
            for entry in report["entries"]:
                table[report["agent_id"] + entry["key"]] = entry["value"]
                count += 1

    app.agent(events)(set_each)

    async def main() -> None:
        await app.start()
        while not started or time.perf_counter() - started < STOCK_SECONDS:
            await asyncio.sleep(0.1)
        print(json.dumps({"entries": count, "seconds": time.perf_counter() - started}), flush=True)
        os._exit(0)  # its shutdown would wait for the changelog

    import uvloop

    uvloop.run(main())


def plain(topic: str, servers: str, entries: int, **_: Any) -> None:
    """Consume, decode, keep the latest: nothing else."""
    consumer, started = assigned_consumer(servers, topic)
    newest: Newest = {}
    count = 0
    while count < entries:
        count += fold(consumer.consume(5000, 0.1), newest)
    print(json.dumps({"entries": count, "seconds": time.perf_counter() - started[0]}))


def ours(
    topic: str,
    servers: str,
    entries: int,
    entries_a_report: int,
    batches: str,
    settings: dict[str, Any] | None = None,
    **_: Any,
) -> None:
    """The worker as `agent-metadata worker` runs it; `settings` are those that the topic's format needs."""
    import uvloop
    from prometheus_client import CollectorRegistry

    from pipeline.clock import SystemClock
    from pipeline.kafka.dead_letters import DeadLetterWriter
    from pipeline.kafka.publisher import Publisher
    from pipeline.kafka.topics import Incarnation
    from pipeline.monitoring.metrics import WorkerMetrics
    from pipeline.roles.process import tune_garbage_collector
    from pipeline.settings import Settings
    from pipeline.worker import Worker

    async def main() -> None:
        configured = Settings(
            kafka_bootstrap_servers=servers,
            events_topic=topic,
            batches_topic=batches,
            consumer_group=f"ours-{uuid.uuid4().hex[:8]}",
            window_seconds=1.0,
            **(settings or {}),
        )
        registry = CollectorRegistry()
        publisher = Publisher(configured.client_config())

        async def topic_id() -> str:
            return "bench"

        metrics = WorkerMetrics(registry)
        worker = Worker(
            configured,
            publisher=publisher,
            dead_letters=DeadLetterWriter(publisher, "none", stage="worker", source_topic=topic),  # no record is bad
            incarnation=Incarnation(topic, topic_id),
            partitions=harness.PARTITIONS,
            clock=SystemClock(),
            metrics=metrics,
        )

        def folded_records() -> float:
            return float(next(iter(metrics.records.collect())).samples[0].value)

        started: list[float] = []

        async def assigned(*_: Any, **__: Any) -> None:
            started.append(time.perf_counter())

        worker.app.on_partitions_assigned.connect(assigned)
        tune_garbage_collector()

        async def stop_at_the_end() -> None:
            while folded_records() < entries / entries_a_report:
                await asyncio.sleep(0.005)
            worker.stop()

        stopping = asyncio.create_task(stop_at_the_end())
        ended: list[float] = []

        async def committed(*_: Any, **__: Any) -> None:
            ended.append(time.perf_counter())

        worker.app.on_before_shutdown.connect(committed)  # called after the worker's own handler
        await worker.run()
        await stopping
        seconds = ended[0] - started[0]
        folded = registry.get_sample_value("agent_metadata_entries_total")
        assert folded == entries, f"{folded} of {entries} entries were published"
        await publisher.close(5)
        print(json.dumps({"entries": entries, "seconds": seconds}))

    uvloop.run(main())


def main() -> None:
    from pipeline.local import start_services

    figures, ratios = {}, {}
    with start_services(say=harness.say, postgres=False) as services:
        servers = services.bootstrap_servers
        for shape in (10, 1):
            topic, batches = f"events-{shape}", f"batches-{shape}"
            harness.say(f"producing {ENTRIES:,} entries, {shape} per report")
            harness.fill_events(servers, topic, entries=ENTRIES, entries_a_report=shape)
            harness.create_topic(servers, batches)

            def side(name: str, topic: str = topic, batches: str = batches, shape: int = shape) -> float:
                done = harness.run_side(
                    "bench.worker",
                    name,
                    topic=topic,
                    batches=batches,
                    servers=servers,
                    entries=ENTRIES,
                    entries_a_report=shape,
                )
                return float(done["entries"] / done["seconds"])

            measured = harness.in_turn(
                {f"{name}_{shape}": lambda name=name: side(name) for name in ("stock", "plain", "ours")}, RUNS
            )
            figures.update(measured)
            ratios[f"worker_vs_stock_faust_{shape}"] = harness.ratio(measured, f"ours_{shape}", f"stock_{shape}")
            ratios[f"worker_vs_plain_loop_{shape}"] = harness.ratio(measured, f"ours_{shape}", f"plain_{shape}")
        harness.report(
            "worker",
            unit="entries a second",
            services=services.broker,
            figures=figures,
            ratios=ratios,
            note=__doc__ or "",
        )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        {"stock": stock, "plain": plain, "ours": ours}[sys.argv[1]](**json.loads(sys.argv[2]))
