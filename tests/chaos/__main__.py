"""All chaos scenarios with several seeds, a table at the end, and bench/results/chaos.json.

`make chaos`, or `make chaos SCENARIO=worker_killed SEEDS=5`: scenarios by name, comma separated; seeds 1 to n.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.harness import conditions, say, write
from pipeline.local import PackagedKafka, PackagedPostgres, kafka_classpath
from tests.chaos.harness import Run, Scenario, Services
from tests.chaos.scenarios import SCENARIOS
from tests.chaos.verdict import Verdict

WIDTH = 120  # of the table, on a terminal or not
COUNTED = ("events", "rows", "rows_wrong", "batches_twice", "moves_back", "unnoticed")


async def run_all(scenarios: Sequence[Scenario], seeds: Sequence[int], folder: Path) -> tuple[list[Any], list[str]]:
    """Run each scenario with each seed; return a summary of each, and what went wrong or could not run."""
    summaries, complaints = [], []
    with PackagedKafka(kafka_classpath(say)) as kafka, PackagedPostgres() as postgres:
        services = Services(kafka, postgres)
        for scenario in scenarios:
            if scenario.needs and (reason := scenario.needs()):
                complaints.append(f"{scenario.name} not run: {reason}")
                continue
            verdicts = []
            for seed in seeds:
                say(f"{scenario.name}, seed {seed}")
                try:
                    verdict = await Run(services, scenario, seed, folder).perform()
                except AssertionError as error:
                    complaints.append(str(error))
                else:
                    verdicts.append(verdict)
                    if not verdict.is_right:
                        complaints.append(f"{verdict}; logs in {folder}")
            if verdicts:
                summaries.append(summary(scenario, verdicts))
    return summaries, complaints


def summary(scenario: Scenario, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "scenario": scenario.name,
        "seeds": [verdict.seed for verdict in verdicts],
        **{name: sum(getattr(verdict, name) for verdict in verdicts) for name in COUNTED},
        "problems": sum(len(verdict.problems) for verdict in verdicts),
        "ended_by_themselves": dict(
            sum((verdict.restarts for verdict in verdicts), start=type(verdicts[0].restarts)())
        ),
        "catch_up_seconds": max(verdict.catch_up_seconds for verdict in verdicts),
        "seconds": round(sum(verdict.seconds for verdict in verdicts), 1),
    }


def show(summaries: Sequence[dict[str, Any]]) -> None:
    columns = [name for name in summaries[0] if name not in ("rows", "ended_by_themselves")]
    table = Table(title="chaos", padding=0)
    for name in columns:
        table.add_column(name.replace("_", " "), no_wrap=name == "scenario")
    for row in summaries:
        table.add_row(*(str(len(row[name]) if name == "seeds" else row[name]) for name in columns))
    Console(width=max(WIDTH, Console().width)).print(table)


def main(names: str = "", seed_count: str = "3") -> int:
    selected_names = [name for name in names.split(",") if name]
    if unknown := sorted(set(selected_names) - {scenario.name for scenario in SCENARIOS}):
        say(f"no such scenario: {', '.join(unknown)}; there are {', '.join(scenario.name for scenario in SCENARIOS)}")
        return 2
    scenarios = [scenario for scenario in SCENARIOS if not selected_names or scenario.name in selected_names]
    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    summaries, complaints = asyncio.run(run_all(scenarios, range(1, int(seed_count) + 1), folder))
    if summaries:
        show(summaries)
    if not selected_names:
        result = {
            "benchmark": "chaos",
            **conditions("Apache Kafka and Postgres from packages"),
            "note": __doc__,
            "seconds": round(time.monotonic() - started),
            "scenarios": summaries,
        }
        write("chaos", result)
    for complaint in complaints:
        say(complaint, markup=False)
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
