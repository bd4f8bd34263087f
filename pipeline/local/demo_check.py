"""What the demo is judged by: the table, what a listener received, and the metrics of worker and sink."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from pipeline.core.report import agent_uuid
from pipeline.local.deployment import ask
from pipeline.postgres.connections import Connection
from pipeline.postgres.rows import TableRow, read_all_rows

Pair = tuple[str, str]
"""(agent id, key)."""
Content = tuple[str, str, datetime]
"""(value, error, collected_at)."""


class Metrics(NamedTuple):
    """The metrics of several roles: their samples added up by name, without prefix and `_total`."""

    sums: defaultdict[str, float]
    batches_by_reason: dict[str, int]

    @classmethod
    def scrape(cls, ports: Iterable[int]) -> Metrics:
        """Read /metrics of each port; one that does not answer counts as empty."""
        metrics = cls(defaultdict(float), {})
        for port in ports:
            for family in text_string_to_metric_families(ask(port, "/metrics")[1]):
                for sample in family.samples:
                    name = sample.name.removeprefix("agent_metadata_").removesuffix("_total")
                    metrics.sums[name] += sample.value
                    if name == "batches":
                        metrics.batches_by_reason[sample.labels["reason"]] = round(sample.value)
        return metrics

    def saved_ratio(self, entries: float) -> float:
        """Return which part of the entries needed no row to be written."""
        return 1 - self.sums["rows_written"] / max(1, entries)


class Changes:
    """What a listener received, read from the output of `watch --json` while it is written."""

    def __init__(self, path: Path) -> None:
        self.newest: dict[Pair, datetime] = {}
        self.notified_agents: set[str] = set()
        self.freshness_seconds: list[float] = []
        """From the time of each value to its NOTIFY."""
        self._path = path
        self._position = 0

    def read(self) -> None:
        """Take in what was written since the last call."""
        with self._path.open("rb") as lines:
            lines.seek(self._position)
            for line in lines:
                if not line.endswith(b"\n"):  # the rest is yet to be written
                    break
                self._position += len(line)
                self._note(json.loads(line))

    def _note(self, change: Mapping[str, Any]) -> None:
        collected_at = datetime.fromisoformat(change["collected_at"])
        self.newest[change["agent_id"], change["key"]] = collected_at
        if change["notified_at"] is not None:
            self.notified_agents.add(change["agent_id"])
            self.freshness_seconds.append(change["notified_at"] - collected_at.timestamp())

    def missed_agents(self, expected: Mapping[Pair, Content]) -> set[str]:
        """Return the agents that have a final value which the listener did not receive."""
        return {pair[0] for pair, content in expected.items() if self.newest.get(pair) != content[2]}

    def recent_freshness(self) -> float | None:
        """Return the median of the last 1,000 values, in seconds; None if there are none."""
        return median(self.freshness_seconds[-1000:]) if self.freshness_seconds else None

    def freshness_percentiles(self) -> dict[str, float | None]:
        """Return p50 and p99 of all values, in seconds; None if there are fewer than two."""
        if len(self.freshness_seconds) < 2:
            return {"p50": None, "p99": None}
        cuts = quantiles(self.freshness_seconds, n=100)
        return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


async def count_mismatched(connection: Connection, expected: Mapping[Pair, Content]) -> int:
    """Count the rows of the table that are missing, wrong or unexpected, or that lack their agent's name."""
    rows = {
        (str(row.agent_id), row.key): tuple(row[2:5]) if _has_its_name(row) else None
        async for part in read_all_rows(connection)
        for row in part
    }
    wrong = sum(rows.get(pair) != content for pair, content in expected.items())
    return wrong + sum(pair not in expected for pair in rows)


def _has_its_name(row: TableRow) -> bool:
    return row.name is not None and agent_uuid(row.name) == str(row.agent_id)
