"""The demo: the whole data path on this machine, checked against an oracle of what was produced."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvloop
from rich.console import Console
from rich.live import Live

from pipeline.errors import PipelineError
from pipeline.formats.encoder import ReportFormat
from pipeline.local.demo_check import Changes, Content, Metrics, Pair, count_mismatched
from pipeline.local.deployment import ADDRESSES, Deployment, Role
from pipeline.local.process import free_port
from pipeline.local.services import LocalServices, ServicesKind, start_services
from pipeline.local.simulate import read_oracle
from pipeline.settings import Settings, load_settings

_PROGRESS_SECONDS: Final = 0.5
# After the last window: time that a busy machine may need to write everything to the table.
_ARRIVAL_SECONDS: Final = 20.0
# For notifications that are still on their way when the sink has ended.
_NOTIFICATION_SECONDS: Final = 5.0


@dataclass(frozen=True)
class DemoOptions:
    """The command line's options; times in seconds."""

    agents: int
    keys: int
    interval: float
    window: float
    duration: float
    services: ServicesKind | None
    serve: bool = False
    format: ReportFormat = "json"


def run_demo(options: DemoOptions, *, console: Console) -> dict[str, Any]:
    """Run the demo; return the summary, whose `mismatched_rows` is 0 if every row is right.

    Guarantee: all processes that it starts have ended when it returns or raises, on SIGTERM and SIGHUP too.

    Raises:
        PipelineError: something did not come up, or ended early.
        KeyboardInterrupt: a signal ended it.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup leaves it
        signal.signal(signal.SIGHUP, _interrupt)
    _check_settings()

    def say(line: str) -> None:
        console.print(line, markup=False)

    registry = options.format != "json"
    with (
        start_services(options.services, say=say, registry=registry) as services,
        tempfile.TemporaryDirectory() as folder,
    ):
        say(f"broker: {services.broker}")
        say(f"database: {services.database}")
        if registry:
            say(f"schemas: {services.registry}")
        return uvloop.run(_Demo(options, services, Path(folder), console).run())


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _check_settings() -> None:
    """Refuse wrong settings before starting services, which takes a while; an empty address counts as unset."""
    empty = [name for name, variable in ADDRESSES.items() if os.environ.get(variable) == ""]
    load_settings(**{name: Settings.model_fields[name].default for name in empty})


class _Demo:
    """One run: its processes, its progress line and its summary."""

    def __init__(self, options: DemoOptions, services: LocalServices, folder: Path, console: Console) -> None:
        self._options = options
        self._services = services
        self._console = console
        self._oracle_path = folder / "oracle.jsonl"
        port = free_port(2)
        self._ports = (port, port + 1)  # `run` serves the sink's metrics one above the worker's
        self._deployment = Deployment(
            services.bootstrap_servers,
            services.database_url,
            folder,
            run_id=f"demo{os.getpid()}",
            own_schema=True,
            logs_to_stderr=True,
            window_seconds=options.window,
            metrics_port=port,
            **({"schema_registry_url": services.registry_url} if services.registry_url else {}),
        )

    async def run(self) -> dict[str, Any]:
        try:
            await self._deployment.prepare()
            return await self._run()
        finally:
            self._deployment.stop_all()
            await self._deployment.drop()  # others may use the cluster and the database too

    async def _run(self) -> dict[str, Any]:
        deployment = self._deployment
        running = deployment.start("run")
        watching = deployment.start("watch", "--json")
        changes = Changes(watching.output_path)
        if self._options.serve:
            settings = deployment.settings
            await deployment.ready(deployment.start("serve"), settings.serve_port)
            self._console.print(f"live page: http://{settings.serve_host}:{settings.serve_port}/", markup=False)
        # Ready, not only up: what they log until then would tear the progress line.
        await deployment.ready(running, *self._ports)
        produced = await self._produce(running, changes)
        expected = read_oracle(self._oracle_path)
        mismatched = await self._wait_until_right(expected)
        metrics = Metrics.scrape(self._ports)
        deployment.stop(running)
        agents_missed = await self._wait_until_heard(changes, expected)
        deployment.stop(watching)
        changes.read()
        return {
            "broker": self._services.broker,
            "database": self._services.database,
            "reports_produced": produced["reports"],
            "entries_produced": produced["entries"],
            "rows_expected": len(expected),
            "mismatched_rows": mismatched,
            "rows_written": round(metrics.sums["rows_written"]),
            "writes_saved_ratio": round(metrics.saved_ratio(produced["entries"]), 4),
            "batches": metrics.batches_by_reason,
            "notify_payloads": round(metrics.sums["notify_payloads"]),
            "agents_notified": len(changes.notified_agents),
            "agents_missed": agents_missed,
            "freshness_seconds": changes.freshness_percentiles(),
        }

    async def _produce(self, running: Role, changes: Changes) -> dict[str, int]:
        """Have simulated agents report, with a progress line meanwhile; return what `produce --json` counted."""
        options = self._options
        producing = self._deployment.start(
            "produce",
            f"--agents={options.agents}",
            f"--keys={options.keys}",
            f"--interval={options.interval}",
            f"--duration={options.duration}",
            f"--oracle={self._oracle_path}",
            f"--format={options.format}",
            "--json",
        )
        started = time.monotonic()
        with Live(console=self._console, refresh_per_second=2, transient=True) as live:
            while producing.poll() is None:
                await asyncio.sleep(_PROGRESS_SECONDS)
                if running.poll() is not None:
                    raise PipelineError("worker and sink ended early: see their messages above")
                changes.read()
                live.update(self._progress(time.monotonic() - started, changes))
        if producing.returncode != 0:
            raise PipelineError("the simulated agents failed: see their message above")
        produced: dict[str, int] = json.loads(producing.output_path.read_bytes())
        return produced

    def _progress(self, elapsed: float, changes: Changes) -> str:
        metrics = Metrics.scrape(self._ports)
        sums, freshness = metrics.sums, changes.recent_freshness()
        saved = f"{metrics.saved_ratio(sums['entries']):.0%}" if sums["entries"] else "-"
        return (
            f"{elapsed:3.0f}/{self._options.duration:.0f} s · reports {sums['records']:.0f} · "
            f"open pairs {sums['open_pairs']:.0f} · rows {sums['rows_written']:.0f} · writes saved {saved} · "
            f"freshness {'-' if freshness is None else f'{freshness:.2f} s'}"
        )

    async def _wait_until_right(self, expected: Mapping[Pair, Content]) -> int:
        """Return how many rows are wrong: 0 as soon as none is, else when time has run out."""
        deadline = time.monotonic() + self._options.window + _ARRIVAL_SECONDS
        async with self._deployment.connection() as connection:
            while True:
                wrong = await count_mismatched(connection, expected)
                if not wrong or time.monotonic() > deadline:
                    return wrong
                await asyncio.sleep(0.2)

    async def _wait_until_heard(self, changes: Changes, expected: Mapping[Pair, Content]) -> int:
        """Return how many agents had final values that the listener missed: 0 as soon as there are none."""
        deadline = time.monotonic() + _NOTIFICATION_SECONDS
        while True:
            changes.read()
            missed = changes.missed_agents(expected)
            if not missed or time.monotonic() > deadline:
                return len(missed)
            await asyncio.sleep(0.1)
