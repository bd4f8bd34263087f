"""Simulated agents: reports at a steady pace, and an oracle of what the table must contain in the end."""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from pipeline.core.report import agent_uuid
from pipeline.producer import MetadataProducer

# Names of coder's own examples come first; further keys are numbered.
_KEYS: Final = ("cpu", "memory", "disk", "load", "status", "uptime", "users", "network", "processes", "version")


class Simulated(NamedTuple):
    """One report of an agent with this name, to be sent `due` seconds after the start."""

    due: float
    name: str
    keys: list[str]
    values: list[str]
    errors: list[str]


@dataclass
class Oracle:
    """The newest accepted entry of each pair: what the table must contain when everything has arrived."""

    reports: int = 0
    entries: int = 0
    dropped: int = 0
    newest: dict[tuple[str, str], tuple[str, str, datetime]] = field(default_factory=dict)

    def note(self, report: Simulated, collected_at: datetime) -> None:
        """Note an accepted report."""
        self.reports += 1
        self.entries += len(report.keys)
        identity = agent_uuid(report.name)
        for key, value, error in zip(report.keys, report.values, report.errors, strict=True):
            self.newest[identity, key] = (value, error, collected_at)

    def write(self, path: Path) -> None:
        """Write one JSON line per pair."""
        with path.open("w", encoding="utf-8") as lines:
            for (agent_id, key), (value, error, collected_at) in self.newest.items():
                line = [agent_id, key, value, error, collected_at.isoformat()]
                lines.write(json.dumps(line) + "\n")


def read_oracle(path: Path) -> dict[tuple[str, str], tuple[str, str, datetime]]:
    """Read what Oracle.write() wrote: (value, error, collected_at) by (agent id, key)."""
    with path.open(encoding="utf-8") as lines:
        return {
            (agent_id, key): (value, error, datetime.fromisoformat(collected_at))
            for agent_id, key, value, error, collected_at in map(json.loads, lines)
        }


def agent_name(number: int) -> str:
    """Return the name of the simulated agent with this number."""
    return f"host-{number:04}"


def agent_id(number: int) -> uuid.UUID:
    """Return the id of the simulated agent with this number."""
    return uuid.UUID(agent_uuid(agent_name(number)))


def reports(
    *, agents: int, keys: int, interval_seconds: float, duration_seconds: float, seed: int = 0
) -> Iterator[Simulated]:
    """Yield the reports in the order in which they are due: every agent once per interval, evenly spread."""
    dice = random.Random(seed)  # noqa: S311  # made-up measurements, not secrets
    hosts = [agent_name(number) for number in range(1, agents + 1)]
    names = [*_KEYS[:keys], *(f"metric_{number}" for number in range(len(_KEYS), keys))]
    for tick in range(max(1, round(duration_seconds / interval_seconds))):
        for number, host in enumerate(hosts):
            due = (tick + number / agents) * interval_seconds
            values = [f"{dice.random() * 100:.1f}%" for _ in names]
            errors = ["" if dice.random() > 0.01 else "timed out" for _ in names]
            yield Simulated(due, host, names, values, errors)


def send_at_pace(
    simulated: Iterator[Simulated], producer: MetadataProducer, *, is_stopped: Callable[[], bool]
) -> Oracle:
    """Send each report when it is due; return what was accepted."""
    oracle = Oracle()
    start = time.monotonic()
    for report in simulated:
        if is_stopped():
            break
        ahead = report.due - (time.monotonic() - start)
        if ahead > 0.002:  # shorter sleeps overshoot
            time.sleep(ahead)
        collected_at = datetime.now(UTC)
        if producer.add(report.name, report.keys, report.values, report.errors, collected_at):
            oracle.note(report, collected_at)
        else:
            oracle.dropped += 1
    return oracle
