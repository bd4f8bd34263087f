"""The command `map`: what a record becomes with the present settings, without Kafka and Postgres."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from pipeline.cli.console import CommandGroup, JsonOption, command_settings, print_json
from pipeline.core.decoding import RecordDecoder, fold_loading
from pipeline.core.printable import printable
from pipeline.core.record import KafkaRecord
from pipeline.core.window import UNLIMITED, ClosedWindow, OpenWindow
from pipeline.errors import ConfigError, ExitCode
from pipeline.formats.decoder import decoders
from pipeline.settings import Settings

_MOST_CHARACTERS = 200

app = CommandGroup()


@app.command("map")
def map_sample(
    sample: Annotated[
        Path,
        typer.Option(metavar="FILE", help="The value of a record, or one in each line (NDJSON); - for stdin."),
    ],
    key: Annotated[str | None, typer.Option(metavar="TEXT", help="The record key.", show_default="none")] = None,
    headers: Annotated[
        list[str] | None,
        typer.Option("--header", metavar="NAME=VALUE", help="A header of the record; repeat it for more."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what records of the events topic become with the present settings: agents and entries, or dead letters.

    Try a mapping with it before a worker has it: write the table `mapping` to a TOML file, name that file in
    AGENT_METADATA_CONFIG_FILE, and save records of the topic, such as by `kafka-console-consumer --topic T
    --from-beginning --max-messages 100 > sample.json`. It needs neither Kafka nor Postgres, and changes nothing.

    Exit code 1 if a record, or part of it, would be a dead letter.
    """
    settings = command_settings()
    values = _values(settings, sample)
    decoder, now_ms, failed = decoders(settings)(), time.time_ns() // 1_000_000, False
    parsed = tuple(_header(text) for text in headers or ())
    for number, value in enumerate(values, start=1):
        record = KafkaRecord(number, now_ms, None if key is None else key.encode(), value, parsed)
        closed = _folded(settings, decoder, record)
        failed = failed or bool(closed.rejected)
        if as_json:
            print_json({"record": number, **_described(closed, now_ms)})
        else:
            _show(f"record {number}: " if len(values) > 1 else "", closed, now_ms)
    if failed:
        raise typer.Exit(ExitCode.FAILURE)


def _values(settings: Settings, sample: Path) -> list[bytes]:
    """Return the values of the records in a file."""
    try:
        raw = sys.stdin.buffer.read() if sample == Path("-") else sample.read_bytes()
    except OSError as error:
        raise ConfigError(f"--sample {sample}: {error.strerror}") from None
    if not raw:
        raise ConfigError(f"--sample {sample}: the file is empty")
    if settings.events_format == "otlp_proto" or raw[:1] < b"\t":  # binary
        return [raw]
    lines = [line for line in raw.splitlines() if line.strip()]
    return lines if len(lines) > 1 and _is_json(lines[0]) and not _is_json(raw) else [raw.rstrip(b"\r\n")]


def _is_json(raw: bytes) -> bool:
    try:
        msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return True


def _header(text: str) -> tuple[str, bytes]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise ConfigError(f"--header {text!r}: write NAME=VALUE")
    return name, value.encode()


def _folded(settings: Settings, decoder: RecordDecoder, record: KafkaRecord) -> ClosedWindow:
    """Fold a record as a worker does, which includes all limits, and the clock skew."""
    window = OpenWindow(0.0, capacity=UNLIMITED, max_clock_skew=settings.max_clock_skew, decoder=decoder)
    fold_loading(window, decoder, [record])
    return window.close("scheduled", 0.0)


def _described(closed: ClosedWindow, now_ms: int) -> dict[str, Any]:
    agents: dict[str, dict[str, Any]] = {}
    for row in closed.rows:
        agent: dict[str, Any] = {"agent_id": row.agent_id, "name": closed.names.get(row.agent_id), "entries": []}
        has_time = row.collected_at_us != now_ms * 1000
        agents.setdefault(row.agent_id, agent)["entries"].append(
            {
                "key": row.key,
                "value": row.value,
                "error": row.error,
                "collected_at": row.collected_at.isoformat().replace("+00:00", "Z") if has_time else None,
            }
        )
    return {"agents": list(agents.values()), "dead_letter": closed.rejected[0].reason if closed.rejected else None}


def _show(prefix: str, closed: ClosedWindow, now_ms: int) -> None:
    described = _described(closed, now_ms)
    for agent in described["agents"]:
        name, entries = agent["name"], agent["entries"]
        called = agent["agent_id"] if name is None else f"{name} (its UUID is {agent['agent_id']})"
        print(printable(f"{prefix}agent {called}", limit=_MOST_CHARACTERS))
        _show_entries(entries)
    if described["dead_letter"] is not None:
        what = "the rest is a dead letter" if described["agents"] else "a dead letter"
        print(printable(f"{prefix}{what}: {described['dead_letter']}", limit=2 * _MOST_CHARACTERS))
    elif not described["agents"]:
        print(f"{prefix}nothing: no entries, and no dead letter either")


def _show_entries(entries: Sequence[dict[str, Any]]) -> None:
    rows = []
    for entry in entries:
        error = f"error: {entry['error']}" if entry["error"] else ""
        value = entry["value"] or ("" if error else "(no value)")
        at = entry["collected_at"] or "(the record's timestamp)"
        rows.append([printable(text, limit=_MOST_CHARACTERS) for text in (entry["key"], value, error, at)])
    widths = [min(40, max(map(len, column))) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{text:{width}}" for text, width in zip(row, widths, strict=True) if width]
        print(f"  {'  '.join(cells)}".rstrip())
