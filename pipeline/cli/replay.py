"""The commands `replay` and `refill`: their options and output."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.cli.console import (
    CommandGroup,
    JsonOption,
    agent_ids,
    command_settings,
    complain,
    print_json,
    run_job,
    stderr,
)
from pipeline.cli.moments import parse_moment
from pipeline.errors import ConfigError, ExitCode, ServiceUnavailable
from pipeline.kafka.topics import TopicFacts, require_topics
from pipeline.postgres.connections import connected
from pipeline.postgres.migrations import require_schema
from pipeline.replay.folds import ReplaySource
from pipeline.replay.plan import ReplayPlan, load_plan, save_plan
from pipeline.replay.refill import chunk_reader, find_ranges, refill, replay_store, wire_replay
from pipeline.replay.replay import Interrupted, PairFilter, Replay, Summary
from pipeline.roles.process import tune_garbage_collector
from pipeline.settings import Settings

NOW: Final = "now"
# Worker and sink come first when the processor is busy: a replay can wait.
_NICENESS: Final = 10

app = CommandGroup()


@app.command()
def replay(
    start: Annotated[
        str | None,
        typer.Option("--from", metavar="TIME", help="Start of the range: RFC 3339, or an age such as '2h ago'."),
    ] = None,
    end: Annotated[str, typer.Option("--to", metavar="TIME", help="End of the range, exclusive.")] = NOW,
    agents: Annotated[
        list[str] | None, typer.Option("--agent", metavar="AGENT", help="Only this agent's rows; repeat it for more.")
    ] = None,
    keys: Annotated[
        list[str] | None, typer.Option("--key", metavar="KEY", help="Only this key's rows; repeat it for more.")
    ] = None,
    source: Annotated[
        ReplaySource | None,
        typer.Option(
            help="The topic to read: events has every report; batches has what the windows kept of them.",
            show_default="events",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would change.")] = False,
    rate: Annotated[
        float | None,
        typer.Option(metavar="N", min=1, help="Read at most N records, and write at most N rows, per second."),
    ] = None,
    notify: Annotated[
        Literal["off", "final"] | None,
        typer.Option(
            help="final: notify listeners as rows are written.",
            show_default="final, or off if AGENT_METADATA_NOTIFY is off",
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep the progress in this file, and resume from it if it exists."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read a time range of a topic again, and write the values that are newer than their rows.

    The range is in arrival times at the broker. No row goes back to an older value, and the live consumer groups
    are not touched, so a replay is safe at any time, and safe to repeat.

    To see what it would do: agent-metadata replay --from '2h ago' --dry-run
    """
    settings = command_settings()
    if dry_run and resume:
        raise ConfigError("--dry-run changes nothing, so there is nothing to --resume: give only one of them")
    only = PairFilter(agent_ids(agents), frozenset(keys or ()))
    plan = load_plan(resume) if resume else None
    if plan is None:
        plan = _new_plan(start, end, source or "events", only)
    else:
        _require_same(plan, source, only, resume)
    os.nice(_NICENESS)
    run = _Run(settings, plan, resume, is_dry_run=dry_run)
    is_notifying = settings.notify == "on" if notify is None else notify == "final"
    run_job(run.run(rate=rate, is_notifying=is_notifying))
    if resume:
        resume.unlink(missing_ok=True)
    _show(run.summary(), as_json=as_json)


def _new_plan(start: str | None, end: str, source: ReplaySource, only: PairFilter) -> ReplayPlan:
    now = datetime.now(UTC)
    if start is None:
        raise ConfigError("say which range: --from TIME [--to TIME], such as --from '2h ago'")
    began = parse_moment(start, now, option="--from")
    # `now` is the topic's own end, whatever this machine's clock says.
    ends = None if end == NOW else parse_moment(end, now, option="--to")
    if began >= (ends or now):
        raise ConfigError(f"--from {began:%Y-%m-%dT%H:%M:%SZ} is not before --to {ends or now:%Y-%m-%dT%H:%M:%SZ}")
    return ReplayPlan(source, "", "", began, ends, sorted(only.agent_ids), sorted(only.keys), ranges=[])


def _require_same(plan: ReplayPlan, source: ReplaySource | None, only: PairFilter, file: Path | None) -> None:
    """Refuse options that contradict the file; --from and --to always come from the file."""
    asked = (source or plan.source, only if only else plan.only)
    if asked != (plan.source, plan.only):
        raise ConfigError(
            f"--resume {file} belongs to another replay: give the same --source, --agent and --key, or none"
        )


class _Run:
    """One replay, with its progress bar and its file."""

    def __init__(self, settings: Settings, plan: ReplayPlan, file: Path | None, *, is_dry_run: bool) -> None:
        self._settings = settings
        self._plan = plan
        self._file = file
        self._is_dry_run = is_dry_run
        self._seconds = 0.0

    async def run(self, *, rate: float | None, is_notifying: bool) -> None:
        plan = self._plan
        topic = (await require_topics(self._settings.client_config(), self._settings.declared_topics()))[plan.source]
        async with connected(self._settings.database_url.get_secret_value()) as connection:
            await require_schema(connection)
        if plan.topic_id:
            self._require_topic(topic)
        else:
            await self._find_ranges(topic)
        async with (
            chunk_reader(self._settings, topic) as reader,
            replay_store(self._settings, notify=is_notifying) as store,
        ):
            started = time.monotonic()
            with _progress() as bar:
                task = bar.add_task("replaying", total=sum(offsets.length for offsets in plan.left))
                job = wire_replay(
                    self._settings,
                    plan.source,
                    reader,
                    store,
                    only=plan.only,
                    is_dry_run=self._is_dry_run,
                    rate=rate,
                    on_read=lambda records: bar.advance(task, records),
                )
                await self._run_job(job)
            self._seconds = round(time.monotonic() - started, 3)

    async def _run_job(self, job: Replay) -> None:
        _stop_on_signals(job)
        self._save()  # from now on an interrupted replay can be resumed
        tune_garbage_collector()
        try:
            await job.run(self._plan.left, self._plan.summary, self._done)
        except Interrupted:
            advice = f"continue with --resume {self._file}" if self._file else "--resume FILE lets one be continued"
            complain(f"interrupted with {self._plan.summary.changed} rows changed; {advice}")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
        finally:
            self._save()

    def _require_topic(self, topic: TopicFacts) -> None:
        plan = self._plan
        if plan.topic_id != topic.topic_id:
            raise ConfigError(
                f"--resume {self._file} belongs to a {plan.topic} that was deleted: delete the file and start again"
            )
        complain(f"resuming: {len(plan.done)} of {len(plan.ranges)} partitions are done")

    async def _find_ranges(self, topic: TopicFacts) -> None:
        plan = self._plan
        if topic.is_embedded:
            raise ConfigError(
                "the embedded broker can't find records by time: set KAFKA_BOOTSTRAP_SERVERS to a real one"
            )
        found = await find_ranges(self._settings, topic, _ms(plan.start), _ms(plan.end))
        if any(item.is_cut for item in found):
            complain(f"the range may be incomplete: retention has deleted the oldest records of {topic.name}")
        plan.topic, plan.topic_id = topic.name, topic.topic_id
        plan.ranges = found

    def _done(self, partition: int) -> None:
        self._plan.done.append(partition)
        self._save()

    def _save(self) -> None:
        if self._file:
            save_plan(self._plan, self._file)

    def summary(self) -> dict[str, Any]:
        plan = self._plan
        return {
            "dry_run": self._is_dry_run,
            "source": plan.source,
            "topic": plan.topic,
            "from": plan.start,
            "to": plan.end or NOW,
            **msgspec.structs.asdict(plan.summary),
            "already_newer": plan.summary.already_newer,
            "seconds": self._seconds,
        }


_LABELS: Final = {
    "records": "records read",
    "entries": "entries in them",
    "dead": "unreadable, in the dead-letter topic",
    "pairs": "pairs",
    "changed": "rows changed",
    "already_newer": "rows already as new or newer",
    "undeclared": "pairs without a row, skipped",
    "refused": "rows that Postgres refused",
}


def _show(summary: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(summary)
        return
    labels = _LABELS | ({"changed": "rows that would change"} if summary["dry_run"] else {})
    width = max(map(len, labels.values()))
    for name, label in labels.items():
        print(f"{label:{width}}  {summary[name]:>12,}")
    rate = summary["records"] / max(summary["seconds"], 0.001)
    print(f"{'seconds':{width}}  {summary['seconds']:>12,}  ({rate:,.0f} records a second)")


def _stop_on_signals(job: Replay) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, job.stop)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} of {task.total:,.0f} records, {task.speed:,.0f}/s"),
        TimeRemainingColumn(),
        console=stderr,
        disable=not stderr.is_terminal,
    )


def _ms(moment: datetime | None) -> int | None:
    return None if moment is None else round(moment.timestamp() * 1000)


@app.command(name="refill")
def refill_table(as_json: JsonOption = False) -> None:
    """Write everything in the batches topic into the table again, as a sink does by itself when the table was emptied.

    No row goes back to an older value, and live writers continue, so a refill is safe at any time.
    """
    settings = command_settings()
    os.nice(_NICENESS)
    started = time.monotonic()
    summary = run_job(_refill(settings))
    if summary is None:
        raise ServiceUnavailable("another process is refilling the table: wait for it, see `agent-metadata status`")
    counts = msgspec.structs.asdict(summary)
    seconds = round(time.monotonic() - started, 3)
    _show({**counts, "already_newer": summary.already_newer, "seconds": seconds, "dry_run": False}, as_json=as_json)


async def _refill(settings: Settings) -> Summary | None:
    async with connected(settings.database_url.get_secret_value()) as connection:
        await require_schema(connection)
    tune_garbage_collector()
    with _progress() as bar:
        task = bar.add_task("refilling", total=None)
        try:
            return await refill(
                settings,
                on_found=lambda records: bar.update(task, total=records),
                on_read=lambda records: bar.advance(task, records),
                on_start=_stop_on_signals,
            )
        except Interrupted:
            complain("interrupted; run it again to refill the rest")
            raise typer.Exit(ExitCode.INTERRUPTED) from None
