"""The worker on other formats than our own JSON: Avro, Protobuf, JSON Schema, and foreign JSON by a mapping.

All topics hold the same reports. Ours is measured as in the worker's benchmark. The plain loop consumes Avro by
confluent_kafka, reads it by fastavro into dicts, as its documentation shows, and keeps the latest of each pair.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from bench import harness
from bench.plain import assigned_consumer
from bench.worker import ours
from pipeline.core.report import Report
from pipeline.formats.encoder import ReportFormat, report_encoder

ENTRIES = 1_000_000
RUNS = 5
MAPPING: Final = {"id": "device.id", "time": "device.at", "entries": "readings"}
_REGISTERED: Final[tuple[ReportFormat, ...]] = ("avro", "protobuf", "json_schema")


def plain_avro(topic: str, servers: str, entries: int, schema: str, **_: Any) -> None:
    """Consume, read with fastavro, keep the latest: nothing else."""
    from fastavro import parse_schema, schemaless_reader

    parsed = parse_schema(json.loads(schema))
    consumer, started = assigned_consumer(servers, topic)
    newest: dict[tuple[str, str], tuple[Any, str, str]] = {}
    count = 0
    while count < entries:
        for message in consumer.consume(5000, 0.1):
            report: Any = schemaless_reader(io.BytesIO(message.value()[5:]), parsed, None)
            agent_id, collected_at = report["agent_id"], report["collected_at"]
            for entry in report["entries"]:
                count += 1
                pair = (agent_id, entry["key"])
                before = newest.get(pair)
                if before is None or collected_at >= before[0]:
                    newest[pair] = (collected_at, entry["value"], entry["error"])
    print(json.dumps({"entries": count, "seconds": time.perf_counter() - started[0]}))


def foreign(report: Report) -> bytes:
    """A device's telemetry, which the mapping above reads."""
    return msgspec.json.encode(
        {
            "type": "telemetry",
            "device": {"id": report.agent_id, "model": "x200", "at": report.collected_at},
            "readings": {entry.key: entry.value for entry in report.entries},
        }
    )


def main() -> None:
    from pipeline.local import start_services

    figures: dict[str, list[float]] = {}
    ratios = {}
    with start_services(say=harness.say, postgres=False, registry=True) as services:
        servers, registry = services.bootstrap_servers, services.registry_url
        for shape in (10, 1):
            settings: dict[str, dict[str, Any]] = {"own": {}, "mapped": {"mapping": MAPPING}}
            settings |= {name: {"schema_registry_url": registry} for name in _REGISTERED}
            sides: dict[str, Callable[[], float]] = {}
            for name, configured in settings.items():
                topic, batches = f"{name}-{shape}", f"batches-{name}-{shape}"
                harness.say(f"producing {ENTRIES:,} entries, {shape} per report: {name}")
                encode = foreign if name == "mapped" else _encoder(name, topic, registry)
                harness.fill_events(servers, topic, entries=ENTRIES, entries_a_report=shape, encode=encode)
                harness.create_topic(servers, batches)
                options: dict[str, Any] = {
                    "servers": servers,
                    "topic": topic,
                    "batches": batches,
                    "entries": ENTRIES,
                    "entries_a_report": shape,
                    "settings": configured,
                }
                sides[f"{name}_{shape}"] = lambda options=options: side("ours", options)
                if name == "avro":
                    plain = {**options, "schema": avro_schema()}
                    sides[f"plain_avro_{shape}"] = lambda options=plain: side("plain_avro", options)
            figures |= harness.in_turn(sides, RUNS)
            ratios[f"avro_vs_plain_loop_{shape}"] = harness.ratio(figures, f"avro_{shape}", f"plain_avro_{shape}")
            for name in settings.keys() - {"own"}:
                ratios[f"{name}_vs_own_json_{shape}"] = harness.ratio(figures, f"{name}_{shape}", f"own_{shape}")
        harness.report(
            "formats",
            unit="entries a second",
            services=services.broker,
            figures=figures,
            ratios=dict(sorted(ratios.items())),
            note=__doc__ or "",
        )


def _encoder(name: str, topic: str, registry: str) -> Callable[[Report], bytes]:
    report_format: ReportFormat = next((known for known in _REGISTERED if known == name), "json")
    return report_encoder(report_format, topic=topic, schema_registry={"url": registry})


def side(name: str, options: dict[str, Any]) -> float:
    done = harness.run_side("bench.formats", name, **options)
    return float(done["entries"] / done["seconds"])


def avro_schema() -> str:
    from pipeline.data_files import data_dir

    return (data_dir("topics") / "report.avsc").read_text(encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        {"ours": ours, "plain_avro": plain_avro}[sys.argv[1]](**json.loads(sys.argv[2]))
