"""The commands `dead-letter ...`: their options and output; the jobs are in redrive.py."""

from __future__ import annotations

import contextlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.cli.console import JsonOption, command_settings, errors, printable, run_job
from pipeline.core.dead_letter import DeadLetter, rfc3339
from pipeline.errors import ConfigError, PipelineError
from pipeline.jobs.redrive import Filter, dead_letters, redrive

app = typer.Typer(help="What could not be used: look at it, and give it another try.", no_args_is_help=True)

AgentOption = Annotated[str | None, typer.Option("--agent", help="Only this agent's (by the record key).")]
StageOption = Annotated[str | None, typer.Option("--stage", help="Only what this refused: worker or sink.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Only where the reason holds this text.")]


@app.command("list")
def list_letters(
    agent: AgentOption = None,
    stage: StageOption = None,
    reason: ReasonOption = None,
    limit: Annotated[int, typer.Option(min=1, help="Show the last so many.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List what the dead-letter topic holds, the oldest first. With --json one line each, and no limit."""
    settings, chosen = command_settings(), _filter(agent, stage, reason)
    shown: deque[DeadLetter] = deque(maxlen=limit)
    count = 0
    with _progress("reading") as on_progress:
        for letter in dead_letters(settings, chosen, on_progress=on_progress):
            count += 1
            if as_json:
                print(json.dumps(_letter_json(letter)))
            else:
                shown.append(letter)
    if as_json:
        return
    for letter in shown:
        place = f"{letter.partition}:{letter.offset}"
        text = f"{place}  {rfc3339(letter.timestamp_ms)}  {letter.stage}  {letter.agent or '-'}  {letter.reason}"
        print(printable(text, limit=300))
    print(f"{count} dead letters" + (f", the last {limit} shown" if count > limit else ""))


@app.command()
def show(
    offset: Annotated[str, typer.Argument(help="Which, as `list` shows it: PARTITION:OFFSET, or OFFSET for 0:OFFSET.")],
    as_json: JsonOption = False,
) -> None:
    """Show one dead letter whole: where it was, why it was refused, its headers and its value."""
    settings, place = command_settings(), _offset(offset)
    letter = next(dead_letters(settings, Filter(offset=place)), None)
    if letter is None:
        raise PipelineError(f"{settings.dead_letter_topic} holds nothing at {place[0]}:{place[1]}; see `list`")
    if as_json:
        print(json.dumps(_letter_json(letter)))
        return
    lines = {
        "was": letter.source,
        "appended": rfc3339(letter.timestamp_ms),
        "dead-lettered": rfc3339(letter.appended_ms),
        "by": letter.stage,
        "reason": letter.reason,
        "redriven": f"{letter.redrives} times",
        "key": letter.agent,
        "headers": ", ".join(f"{name}={value!r}" for name, value in letter.original) or "none",
        "value": "none (a tombstone)" if letter.value is None else letter.value.decode(errors="backslashreplace"),
    }
    for name, text in lines.items():
        print(f"{name + ':':15}{printable(text)}")


@app.command("redrive")
def redrive_letters(
    agent: AgentOption = None,
    stage: StageOption = None,
    reason: ReasonOption = None,
    offset: Annotated[str | None, typer.Option(help="Only this one: PARTITION:OFFSET, or OFFSET for 0:OFFSET.")] = None,
    all_of_them: Annotated[
        bool, typer.Option("--all", help="All there are; needed where no other option says.")
    ] = False,
    max_redrives: Annotated[int, typer.Option(min=1, help="Leave alone what has come back so many times already.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Produce dead letters to the events topic again, after their cause was mended. Harmless to repeat.

    Each entry keeps the time it had, so that an old value can't replace a newer one. What would be refused again
    stays where it is; the dead-letter topic itself is only read.
    """
    settings, chosen = command_settings(), _filter(agent, stage, reason, offset)
    if chosen == Filter() and not all_of_them:
        raise ConfigError("say which: --agent, --stage, --reason, --offset, or --all")
    with _progress("redriving") as on_progress:
        done = run_job(
            redrive(
                settings,
                chosen,
                max_redrives=max_redrives,
                dry_run=dry_run,
                on_refused=lambda letter, why: errors.print(
                    printable(f"{letter.partition}:{letter.offset} stays: {why}", limit=300), markup=False
                ),
                on_progress=on_progress,
            )
        )
    if as_json:
        print(json.dumps({**done._asdict(), "dry_run": dry_run}))
        return
    print(
        f"{'would redrive' if dry_run else 'redriven'} {done.redriven} of {done.matched} dead letters; "
        f"{done.refused} would be refused again, {done.duplicates} say the same as another, "
        f"{done.came_back} came back too often"
    )


def _filter(agent: str | None, stage: str | None, reason: str | None, offset: str | None = None) -> Filter:
    if stage not in (None, "worker", "sink"):
        raise ConfigError(f"--stage {stage}: it is worker or sink")
    return Filter(agent, stage, reason, None if offset is None else _offset(offset))


def _offset(text: str) -> tuple[int, int]:
    partition, _, offset = text.rpartition(":")
    if not offset.isdecimal() or not (partition or "0").isdecimal():
        raise ConfigError(f"{text!r} is no place in a topic: PARTITION:OFFSET, for instance 0:17")
    return int(partition or 0), int(offset)


def _letter_json(letter: DeadLetter) -> dict[str, Any]:
    return {
        "partition": letter.partition,
        "offset": letter.offset,
        "timestamp": rfc3339(letter.timestamp_ms),
        "dead_lettered_at": rfc3339(letter.appended_ms),
        "agent": letter.agent,
        "redrives": letter.redrives,
        "original_headers": {name: (value or b"").decode(errors="replace") for name, value in letter.original},
        **letter.failure_headers,
        "value": None if letter.value is None else letter.value.decode(errors="replace"),
    }


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal's stderr, and nothing elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
