"""What a scenario can do to a pipeline, by subject.

An action is called once, with the run. A fault that lasts is an async context manager: `during` enters it, and leaves
it before the run ends.
"""

from __future__ import annotations

from tests.chaos.harness import Action, Fault, Run


def all_of(*actions: Action) -> Action:
    """Do these one after the other."""

    async def act(run: Run) -> None:
        for action in actions:
            await action(run)

    return act


def during(first: float, last: float, fault: Fault) -> list[tuple[float, Action]]:
    """Return the steps that begin a fault at one second and end it at another."""

    async def begin(run: Run) -> None:
        await run.begin(fault)

    async def end(run: Run) -> None:
        await run.end(fault)

    return [(first, begin), (last, end)]
