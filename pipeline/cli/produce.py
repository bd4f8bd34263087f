"""The command `produce`: reports from stdin, or from simulated agents."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.console import CommandGroup, JsonOption, command_settings, complain, print_json, run_job
from pipeline.core.report import Report, decode_report
from pipeline.errors import DecodeError, PipelineError
from pipeline.formats.encoder import ReportFormat
from pipeline.kafka.topics import require_topics
from pipeline.local.simulate import Simulated, reports, send_at_pace
from pipeline.producer import MetadataProducer

app = CommandGroup()


@app.command()
def produce(
    agents: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Simulate this many agents instead of reading stdin.", show_default=False
        ),
    ] = None,
    keys: Annotated[int, typer.Option(metavar="N", min=1, max=200, help="Metadata keys of each simulated agent.")] = 10,
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.01, help="Time between two reports of one simulated agent.")
    ] = 1.0,
    duration: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.01, help="How long the simulated agents report.")
    ] = 30.0,
    oracle: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write what the table must contain in the end to this file, one JSON line for each simulated pair.",
            show_default=False,
        ),
    ] = None,
    report_format: Annotated[
        ReportFormat,
        typer.Option(
            "--format",
            help="Plain JSON, or a format in Confluent's wire format, whose schema is registered at "
            "AGENT_METADATA_SCHEMA_REGISTRY_URL first.",
        ),
    ] = "json",
    as_json: JsonOption = False,
) -> None:
    """Produce reports: those on stdin, one JSON object per line, or those of simulated agents (--agents).

    A line on stdin: {"agent_id": UUID or name, "entries": [{"key": "cpu", "value": "12%"}]}. "collected_at" (RFC 3339)
    and an entry's "error" are optional. A line that is refused is reported on stderr, and the others are sent.
    """
    settings = command_settings()
    settings.require_own_reports("this command produces reports")
    events = settings.declared_topics()["events"]
    run_job(require_topics(settings.client_config(), {"events": events}))
    with MetadataProducer(
        settings.client_config(),
        topic=settings.events_topic,
        format=report_format,
        schema_registry=settings.registry_config(),
    ) as producer:
        if agents is None:
            counts = _produce_lines(producer)
        else:
            simulated = reports(agents=agents, keys=keys, interval_seconds=interval, duration_seconds=duration)
            counts = _simulate(producer, simulated, oracle)
        counts["not_acknowledged"] = producer.close()
    if as_json:
        print_json(counts)
    else:
        print(", ".join(f"{n} {name}" for name, n in counts.items()))
    if counts["not_acknowledged"] or counts["dropped"] or counts.get("refused"):
        raise PipelineError("some reports were not accepted: see above")


def _simulate(producer: MetadataProducer, simulated: Iterator[Simulated], oracle_file: Path | None) -> dict[str, int]:
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    oracle = send_at_pace(simulated, producer, is_stopped=stopped.is_set)
    if oracle_file is not None:
        oracle.write(oracle_file)
    return {"reports": oracle.reports, "entries": oracle.entries, "dropped": oracle.dropped}


def _produce_lines(producer: MetadataProducer) -> dict[str, int]:
    counts = {"reports": 0, "entries": 0, "empty": 0, "dropped": 0, "refused": 0}
    for number, line in enumerate(sys.stdin.buffer, start=1):
        if not line.strip():
            continue
        try:
            report, left_out = decode_report(line)
            is_queued = _add(producer, report)
            if left_out is not None:
                raise ValueError(left_out)
        except (DecodeError, ValueError) as error:
            counts["refused"] += 1
            complain(f"line {number}: {error}")
            continue
        if not report.entries:
            counts["empty"] += 1  # nothing is sent, and that is not an error: as in coder's agent API
            continue
        counts["reports" if is_queued else "dropped"] += 1
        counts["entries"] += len(report.entries) if is_queued else 0
    return counts


def _add(producer: MetadataProducer, report: Report) -> bool:
    entries = report.entries
    times: datetime | Sequence[datetime] | None = report.collected_at
    if any(entry.collected_at is not None for entry in entries):
        now = datetime.now().astimezone()
        times = [entry.collected_at or report.collected_at or now for entry in entries]
    return producer.add(
        report.agent_id,
        [entry.key for entry in entries],
        [entry.value for entry in entries],
        [entry.error for entry in entries],
        times,
    )
