"""What a scenario can do to a pipeline, by subject.

An action is called with the run and done with. A fault that lasts is an async context manager: `during` enters it, and
leaves it by the time that the run ends.
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
    """Have a fault last from one second to another: the steps of both."""

    async def begin(run: Run) -> None:
        await run.begin(fault)

    async def end(run: Run) -> None:
        await run.end(fault)

    return [(first, begin), (last, end)]
