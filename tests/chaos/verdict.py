"""Judges a run once its load has stopped: waits for lag 0, then compares table, audit and listeners with the oracle."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.chaos.load import Table
from tests.chaos.transactions import ABORTED
from tests.support.deployment import eventually

if TYPE_CHECKING:
    from tests.chaos.harness import Run

CATCH_UP_SECONDS = 120.0
LISTENER_SECONDS = 30.0


@dataclass
class Verdict:
    """What one run found; all but the first four and the last three must be zero or empty."""

    scenario: str
    seed: int
    events: int
    rows: int
    rows_wrong: int = 0
    batches_twice: int = 0
    moves_back: int = 0
    unnoticed: int = 0  # rows whose last value was shown by no listener
    problems: list[str] = field(default_factory=list)
    restarts: Counter[str] = field(default_factory=Counter)  # processes that ended by themselves and were restarted
    catch_up_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def is_right(self) -> bool:
        return not (self.rows_wrong or self.batches_twice or self.moves_back or self.unnoticed or self.problems)


async def judge(run: Run) -> Verdict:
    """Wait until the pipeline has caught up, and compare."""
    expected = run.load.expected()
    verdict = Verdict(run.scenario.name, run.seed, run.load.accepted, len(expected))
    since = time.monotonic()
    try:
        await eventually("lag is 0", run.is_caught_up, CATCH_UP_SECONDS)
    except AssertionError:
        verdict.problems.append(f"lag not 0 after {CATCH_UP_SECONDS} s: {await run.lag()}")
    verdict.catch_up_seconds = round(time.monotonic() - since, 1)
    table = await run.deployment.table()
    wrong = sorted(pair for pair in expected.keys() | table.keys() if table.get(pair) != expected.get(pair))
    verdict.rows_wrong = len(wrong)
    verdict.problems += [f"{pair}: {table.get(pair)} instead of {expected.get(pair)}" for pair in wrong[:3]]
    await _read_audit(run, verdict)
    await _check_listeners(run, verdict, table)
    _count_dead_letters(run, verdict)
    verdict.problems += [f"not accepted: {text}" for text in sorted(set(run.load.refused))]
    for member in run.members:
        if member.ends:
            verdict.restarts[member.role] += len(member.ends)
    return verdict


async def _read_audit(run: Run, verdict: Verdict) -> None:
    async with run.connection() as connection:
        verdict.moves_back = await connection.fetchval("select count(*) from audit_rows where went_back")
        # Each value is produced once, so a batch that took effect twice would write one of them again.
        repeated = await connection.fetchval(
            "select count(*) from "
            "(select from audit_rows group by agent_id, key, value having count(*) > 1) as repeated"
        )
        # Each step must begin where the one before it ended.
        torn = await connection.fetchval(
            "select count(*) from (select before, after, lag(after, 1, 0::bigint) over "
            "(partition by topic_id, partition order by number) as reached from audit_progress) as steps "
            "where before <> reached or after < before"
        )
        aborted = await connection.fetchval(f"select count(*) from audit_rows where value like '% {ABORTED}'")
    verdict.batches_twice = repeated + torn
    if aborted:
        verdict.problems.append(f"{aborted} rows were written from aborted transactions")


async def _check_listeners(run: Run, verdict: Verdict, table: Table) -> None:
    """Check what the listeners showed: every row as it is now, and none that went back."""
    with suppress(AssertionError):
        await eventually("the listener has shown all rows", lambda: not _not_shown(run, table), LISTENER_SECONDS)
    verdict.unnoticed = len(_not_shown(run, table))
    for process in _watch_processes(run):
        verdict.moves_back += _moves_back(_shown(process.output_path))


def _not_shown(run: Run, table: Table) -> set[tuple[str, str]]:
    shown: Table = {}
    for process in _watch_processes(run):
        shown.update(_shown(process.output_path))
    return {pair for pair, content in table.items() if shown.get(pair) != content}


def _watch_processes(run: Run) -> list[Any]:
    return [process for process in run.processes if process.role == "watch"]


def _count_dead_letters(run: Run, verdict: Verdict) -> None:
    found, expected = run.ends(run.deployment.settings.dead_letter_topic)[0], run.scenario.dead_letters
    if found < expected or (found > expected and not run.scenario.dead_letters_repeat):
        verdict.problems.append(f"{found} dead letters instead of {expected}")


def _shown(path: Path) -> list[tuple[tuple[str, str], tuple[str, str, datetime]]]:
    """Read the rows that `watch --json` printed, in order; its last line may be half a line."""
    shown = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            content = (row["value"], row["error"], datetime.fromisoformat(row["collected_at"]))
            shown.append(((row["agent_id"], row["key"]), content))
    return shown


def _moves_back(shown: Sequence[tuple[tuple[str, str], tuple[str, str, datetime]]]) -> int:
    newest: dict[tuple[str, str], tuple[datetime, int]] = {}
    count = 0
    for pair, (value, _, collected_at) in shown:
        order = (collected_at, int(value.split()[0]))
        count += order < newest.get(pair, order)
        newest[pair] = order
    return count
