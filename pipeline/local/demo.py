"""The demo: the whole way of the data on this machine, checked against an oracle of what was produced."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from statistics import quantiles
from typing import Any, Final
from urllib.error import URLError
from urllib.request import urlopen

import asyncpg
import uvloop
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.live import Live

from pipeline.errors import PipelineError
from pipeline.kafka.topics import create_topics, delete_topics
from pipeline.local.services import LocalServices, start_services
from pipeline.postgres.migrations import migrate
from pipeline.postgres.store import read_rows
from pipeline.roles.process import child_command
from pipeline.settings import Settings, load_settings

_PROGRESS_SECONDS: Final = 0.5
# Beyond the last window: what a loaded machine may need to bring everything into the table.
_ARRIVAL_GRACE_SECONDS: Final = 20.0
_PROCESS_END_SECONDS: Final = 25.0


@dataclass(frozen=True)
class DemoOptions:
    """The command line's options; times in seconds."""

    agents: int
    keys: int
    interval: float
    window: float
    duration: float
    services: str | None
    serve: bool = False


@dataclass
class Seen:
    """What the listener saw."""

    newest: dict[tuple[str, str], datetime] = field(default_factory=dict)
    notified: set[str] = field(default_factory=set)
    freshness_seconds: list[float] = field(default_factory=list)

    def note(self, line: bytes) -> None:
        """Note one line of `watch --json`."""
        change = json.loads(line)
        collected_at = datetime.fromisoformat(change["collected_at"])
        self.newest[change["agent_id"], change["key"]] = collected_at
        if change["notified_at"] is not None:
            self.notified.add(change["agent_id"])
            self.freshness_seconds.append(change["notified_at"] - collected_at.timestamp())


def run_demo(options: DemoOptions, *, console: Console) -> dict[str, Any]:
    """Run the demo; return the summary, whose `mismatched_rows` is 0 if every row is right.

    Everything it starts has ended when it returns or raises.

    Raises:
        PipelineError: something did not come up, or ended on the way.
    """

    def terminate(*_: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, terminate)
    _refuse_wrong_settings()

    def say(line: str) -> None:
        console.print(line, markup=False)

    with start_services(options.services, say=say) as services, tempfile.TemporaryDirectory() as folder:  # type: ignore[arg-type]
        say(f"broker: {services.broker}")
        say(f"database: {services.database}")
        return uvloop.run(_Demo(options, services, Path(folder), console).run())


def _refuse_wrong_settings() -> None:
    """Refuse them before services are started, which takes a while; an address left empty counts as not given."""
    given = {name: os.environ.get(name) for name in ("KAFKA_BOOTSTRAP_SERVERS", "DATABASE_URL")}
    for name, value in given.items():
        if value == "":
            del os.environ[name]
    load_settings()


class _Demo:
    """One run: its processes, its progress line and its summary."""

    def __init__(self, options: DemoOptions, services: LocalServices, folder: Path, console: Console) -> None:
        self._options = options
        self._services = services
        self._oracle_file = folder / "oracle.jsonl"
        self._console = console
        self._seen = Seen()
        self._processes: list[asyncio.subprocess.Process] = []
        self._ports = _free_port_pair()
        # Topics, group and tables of this run alone: it may share a cluster and a database with others.
        self._run_id = f"demo{os.getpid()}"
        self._environment = {
            "KAFKA_BOOTSTRAP_SERVERS": services.bootstrap_servers,
            "DATABASE_URL": _with_schema(services.database_url, self._run_id),
            "AGENT_METADATA_EVENTS_TOPIC": f"{self._run_id}.events.v1",
            "AGENT_METADATA_BATCHES_TOPIC": f"{self._run_id}.batches.v1",
            "AGENT_METADATA_DEAD_LETTER_TOPIC": f"{self._run_id}.dead-letter.v1",
            "AGENT_METADATA_CONSUMER_GROUP": self._run_id,
            "AGENT_METADATA_WINDOW_SECONDS": str(options.window),
            "AGENT_METADATA_METRICS_PORT": str(self._ports[0]),
        }
        os.environ.update(self._environment)
        self._settings: Settings = load_settings()
        self._page = f"http://{self._settings.serve_host}:{self._settings.serve_port}/"

    async def run(self) -> dict[str, Any]:
        try:
            await self._prepare()
            return await self._run()
        finally:
            await self._end_all()
            await self._clean_up()

    async def _prepare(self) -> None:
        settings = self._settings
        await asyncio.to_thread(create_topics, settings.client_config(), settings.declared_topics())
        connection = await asyncpg.connect(self._services.database_url)
        try:
            await connection.execute(f'create schema if not exists "{self._run_id}"')
        finally:
            await connection.close()
        connection = await self._connect()
        try:
            await migrate(connection)
        finally:
            await connection.close()

    async def _clean_up(self) -> None:
        """Leave nothing in a cluster and a database that others use too."""
        settings = self._settings
        with suppress(PipelineError, OSError, asyncpg.PostgresError):
            await asyncio.to_thread(delete_topics, settings.client_config(), settings.declared_topics())
            connection = await asyncpg.connect(self._services.database_url)
            await connection.execute(f'drop schema if exists "{self._run_id}" cascade')
            await connection.close()

    async def _run(self) -> dict[str, Any]:
        options = self._options
        running = await self._start("run")
        watching = await self._start("watch", "--json", reads=True)
        reading = asyncio.create_task(self._read(watching))
        if options.serve:
            serving = await self._start("serve")
            await self._wait_until_ready(serving, [self._settings.serve_port], "the live page")
            self._console.print(f"live page: {self._page}", markup=False)
        await self._wait_until_ready(running, self._ports, "worker and sink")
        producing = await self._start(
            "produce",
            f"--agents={options.agents}",
            f"--keys={options.keys}",
            f"--interval={options.interval}",
            f"--duration={options.duration}",
            f"--oracle={self._oracle_file}",
            "--json",
            reads=True,
        )
        produced = await self._show_progress_until(producing, running)
        oracle = _read_oracle(self._oracle_file)
        mismatched = await self._wait_until_right(oracle)
        metrics = await asyncio.to_thread(self._metrics)
        await self._end(running)
        agents_missed = await self._missed(oracle)
        await self._end(watching)
        await reading
        return self._summary(produced, oracle, mismatched, agents_missed, metrics)

    async def _start(self, *arguments: str, reads: bool = False) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *child_command([sys.executable, "-m", "pipeline", *arguments]),
            env={**os.environ, **self._environment},
            stdout=asyncio.subprocess.PIPE if reads else asyncio.subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches the demo alone, which then ends its processes in order
        )
        self._processes.append(process)
        return process

    async def _read(self, watching: asyncio.subprocess.Process) -> None:
        assert watching.stdout is not None
        async for line in watching.stdout:
            self._seen.note(line)

    async def _wait_until_ready(self, process: asyncio.subprocess.Process, ports: Sequence[int], who: str) -> None:
        deadline = time.monotonic() + _ARRIVAL_GRACE_SECONDS
        # Ready, not only up: what they log until then would tear the progress line.
        while not await asyncio.to_thread(lambda: all(_get(port, "ready") for port in ports)):
            if process.returncode is not None or time.monotonic() > deadline:
                raise PipelineError(f"{who} did not come up: see the messages above")
            await asyncio.sleep(0.1)

    async def _show_progress_until(
        self, producing: asyncio.subprocess.Process, running: asyncio.subprocess.Process
    ) -> dict[str, int]:
        assert producing.stdout is not None
        summary = asyncio.create_task(producing.stdout.read())
        started = time.monotonic()
        with Live(console=self._console, refresh_per_second=2, transient=True) as live:
            while not summary.done():
                await asyncio.wait([summary], timeout=_PROGRESS_SECONDS)
                if running.returncode is not None:
                    raise PipelineError("worker and sink ended: see their messages above")
                live.update(self._progress(await asyncio.to_thread(self._metrics), time.monotonic() - started))
        if await producing.wait() != 0:
            raise PipelineError("the simulated agents failed: see their message above")
        produced: dict[str, int] = json.loads(summary.result())
        return produced

    def _progress(self, metrics: Mapping[str, Any], elapsed: float) -> str:
        entries, rows = metrics.get("entries", 0), metrics.get("rows_written", 0)
        saved = f"{1 - rows / entries:.0%}" if entries else "-"
        recent = sorted(self._seen.freshness_seconds[-1000:])
        freshness = f"{recent[len(recent) // 2]:.2f} s" if recent else "-"
        return (
            f"{elapsed:3.0f}/{self._options.duration:.0f} s · reports {metrics.get('records', 0):.0f} · "
            f"open {metrics.get('open_pairs', 0):.0f} · rows {rows:.0f} · saved {saved} · fresh {freshness}"
        )

    def _metrics(self) -> dict[str, Any]:
        """Scrape worker and sink: sums by name, and batches by reason."""
        values: dict[str, Any] = {}
        for port in self._ports:
            for family in text_string_to_metric_families(_get(port, "metrics")):
                for sample in family.samples:
                    name = sample.name.removeprefix("agent_metadata_").removesuffix("_total")
                    values[name] = values.get(name, 0) + sample.value
                    if name == "batches":
                        values.setdefault("batches_by_reason", {})[sample.labels["reason"]] = round(sample.value)
        return values

    async def _wait_until_right(self, oracle: Mapping[tuple[str, str], tuple[Any, ...]]) -> int:
        deadline = time.monotonic() + self._options.window + _ARRIVAL_GRACE_SECONDS
        connection = await self._connect()
        try:
            while True:
                rows = await read_rows(connection, None)
                held = {(str(row[0]), row[1]): tuple(row)[2:] for row in rows}
                wrong = sum(held.get(pair) != content for pair, content in oracle.items())
                wrong += sum(pair not in oracle for pair in held)
                if not wrong or time.monotonic() > deadline:
                    return wrong
                await asyncio.sleep(0.2)
        finally:
            await connection.close()

    async def _missed(self, oracle: Mapping[tuple[str, str], tuple[Any, ...]]) -> int:
        """Count agents whose final values the listener was not told of, after a moment for what is under way."""
        deadline = time.monotonic() + 5
        while True:
            missed = {
                agent_id
                for (agent_id, key), content in oracle.items()
                if self._seen.newest.get((agent_id, key)) != content[2]
            }
            if not missed or time.monotonic() > deadline:
                return len(missed)
            await asyncio.sleep(0.1)

    def _summary(
        self,
        produced: Mapping[str, int],
        oracle: Mapping[tuple[str, str], Any],
        mismatched: int,
        agents_missed: int,
        metrics: Mapping[str, Any],
    ) -> dict[str, Any]:
        rows_written = round(metrics.get("rows_written", 0))
        return {
            "broker": self._services.broker,
            "database": self._services.database,
            "reports_produced": produced["reports"],
            "entries_produced": produced["entries"],
            "rows_expected": len(oracle),
            "mismatched_rows": mismatched,
            "rows_written": rows_written,
            "writes_saved_ratio": round(1 - rows_written / max(1, produced["entries"]), 4),
            "batches": metrics.get("batches_by_reason", {}),
            "notify_payloads": round(metrics.get("notify_payloads", 0)),
            "agents_notified": len(self._seen.notified),
            "agents_missed": agents_missed,
            "freshness_seconds": _percentiles(self._seen.freshness_seconds),
        }

    async def _connect(self) -> Any:
        return await asyncpg.connect(self._settings.database_url.get_secret_value())

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _PROCESS_END_SECONDS)
            except TimeoutError:
                process.kill()
                await process.wait()

    async def _end_all(self) -> None:
        for process in reversed(self._processes):
            with suppress(ProcessLookupError):
                await self._end(process)


def _get(port: int, page: str) -> str:
    try:
        with urlopen(f"http://127.0.0.1:{port}/{page}", timeout=2) as response:  # our own port
            text: str = response.read().decode()
            return text
    except (URLError, OSError):
        return ""


def _free_port_pair() -> tuple[int, int]:
    """Find two free ports in a row: `run` serves the sink's metrics one above the worker's."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            with suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port, port + 1


def _with_schema(database_url: str, schema: str) -> str:
    separator = "&" if "?" in database_url else "?"
    return f"{database_url}{separator}search_path={schema}"


def _read_oracle(path: Path) -> dict[tuple[str, str], tuple[str, str, datetime]]:
    oracle = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            agent_id, key, value, error, collected_at = json.loads(line)
            oracle[agent_id, key] = (value, error, datetime.fromisoformat(collected_at))
    return oracle


def _percentiles(seconds: list[float]) -> dict[str, float | None]:
    if len(seconds) < 2:
        return {"p50": None, "p99": None}
    cuts = quantiles(seconds, n=100)
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}
