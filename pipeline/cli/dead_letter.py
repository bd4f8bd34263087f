"""The commands `dead-letter ...`: their options and output."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.cli.console import CommandGroup, JsonOption, command_settings, complain, print_json, run_job, stderr
from pipeline.core.dead_letter import DeadLetter, rfc3339
from pipeline.core.printable import printable
from pipeline.errors import ConfigError, PipelineError
from pipeline.jobs.redrive import LetterFilter, dead_letters, redrive

app = CommandGroup(help="Inspect the records and rows that were refused, and try them again once the cause is fixed.")

AgentOption = Annotated[
    str | None,
    typer.Option(
        "--agent", metavar="AGENT", help="Only those of this agent, by UUID or name; the record key says whose it is."
    ),
]
StageOption = Annotated[
    str | None, typer.Option("--stage", metavar="STAGE", help="Only those refused by this stage: worker or sink.")
]
ReasonOption = Annotated[
    str | None, typer.Option("--reason", metavar="TEXT", help="Only those whose reason contains this.")
]


@app.command("list")
def list_letters(
    agent: AgentOption = None,
    stage: StageOption = None,
    reason: ReasonOption = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Show at most N, the newest.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List the dead letters, oldest first. With --json, one line for each and no limit."""
    settings, chosen = command_settings(), _filter(agent, stage, reason)
    shown: deque[DeadLetter] = deque(maxlen=limit)
    count = 0
    with _progress("reading") as on_progress:
        for letter in dead_letters(settings, chosen, on_progress=on_progress):
            count += 1
            if as_json:
                print_json(_letter_json(letter))
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
    offset: Annotated[
        str, typer.Argument(metavar="PARTITION:OFFSET", help="Which one, as `list` shows it; OFFSET means 0:OFFSET.")
    ],
    as_json: JsonOption = False,
) -> None:
    """Show one dead letter in full: where it came from, why it was refused, its headers and its value."""
    settings, place = command_settings(), _offset(offset)
    letter = next(dead_letters(settings, LetterFilter(offset=place)), None)
    if letter is None:
        raise PipelineError(f"{settings.dead_letter_topic} has nothing at {place[0]}:{place[1]}; see `list`")
    if as_json:
        print_json(_letter_json(letter))
        return
    lines = {
        "source": letter.source,
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
    offset: Annotated[
        str | None, typer.Option(metavar="PARTITION:OFFSET", help="Only this one; OFFSET means 0:OFFSET.")
    ] = None,
    all_of_them: Annotated[
        bool, typer.Option("--all", help="All of them; needed if no other option says which.")
    ] = False,
    max_redrives: Annotated[
        int, typer.Option(metavar="N", min=1, help="Skip those that have come back N times already.")
    ] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would be redriven.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Produce dead letters to the events topic again, once their cause is fixed. It is safe to repeat.

    Each entry keeps its time, so an old value can't replace a newer one. What would be refused again is skipped. The
    dead-letter topic itself is only read.
    """
    settings, chosen = command_settings(), _filter(agent, stage, reason, offset)
    if chosen == LetterFilter() and not all_of_them:
        raise ConfigError("say which: --agent, --stage, --reason, --offset or --all")
    with _progress("redriving") as on_progress:
        done = run_job(
            redrive(
                settings,
                chosen,
                max_redrives=max_redrives,
                dry_run=dry_run,
                on_refused=lambda letter, why: complain(
                    f"{letter.partition}:{letter.offset} is skipped: {why}", limit=300
                ),
                on_progress=on_progress,
            )
        )
    if as_json:
        print_json({**done._asdict(), "dry_run": dry_run})
        return
    print(
        f"{'would redrive' if dry_run else 'redriven'} {done.redriven} of {done.matched} dead letters; "
        f"{done.refused} would be refused again, {done.duplicates} are duplicates of another, "
        f"{done.came_back} came back too often"
    )


def _filter(agent: str | None, stage: str | None, reason: str | None, offset: str | None = None) -> LetterFilter:
    if stage not in (None, "worker", "sink"):
        raise ConfigError(f"--stage {stage}: must be worker or sink")
    return LetterFilter(agent, stage, reason, None if offset is None else _offset(offset))


def _offset(text: str) -> tuple[int, int]:
    partition, _, offset = text.rpartition(":")
    if not offset.isdecimal() or not (partition or "0").isdecimal():
        raise ConfigError(f"{text!r} is not a position in a topic: write PARTITION:OFFSET, such as 0:17")
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
    """Show a bar if stderr is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
