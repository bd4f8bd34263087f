"""Feed the decoders whatever hypothesis comes up with, for minutes; print how much that was, and what was found."""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from tests.support.foreign import FOREIGN_VALUES, check_mappings, check_otlp
from tests.support.format_checks import TARGETS, outcome
from tests.support.format_checks import damaged as broken
from tests.support.strategies import RECORD_VALUES, check_decoders

# Hypothesis varies what it found interesting within one run, and starts afresh in the next.
EXAMPLES_A_RUN = 2000
DAMAGED_A_VALUE = 50
PIECES = [
    b"",
    b'"',
    b"\\",
    b"\\u0000",
    b"\\ud800",
    b"\\udc00",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b":",
    b"null",
    b"1e999",
    b"-",
    b"\xc3",
]

FUZZED: dict[str, tuple[st.SearchStrategy[bytes | None], Callable[[Any], str]]] = {
    "own json": (RECORD_VALUES, check_decoders),
    "mapping": (RECORD_VALUES | FOREIGN_VALUES, check_mappings),
    "otlp": (st.binary(max_size=300) | FOREIGN_VALUES, check_otlp),
    **{
        name: (st.binary(max_size=300) | target.good | broken(target.good), partial(outcome, target.check))
        for name, target in TARGETS.items()
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--target", choices=sorted(FUZZED), help="one of them; by default all in turn")
    arguments = parser.parse_args()
    seconds = arguments.seconds
    targets = [arguments.target] if arguments.target else sorted(FUZZED)
    seen: Counter[str] = Counter()
    deadline = time.monotonic() + seconds
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        task = progress.add_task("fuzzing", total=seconds)

        @settings(
            max_examples=EXAMPLES_A_RUN,
            deadline=None,
            database=None,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.data(), st.integers(0, 2**32))
        def run(data: st.DataObject, seed: int) -> None:
            target = targets[seed % len(targets)]
            values, check = FUZZED[target]
            raw = data.draw(values)
            for value in (raw, *damaged(raw or b"", seed)):
                if time.monotonic() > deadline:
                    return  # the rest of this run is skipped
                seen[check(value)] += 1
            if seen.total() % 1000 < 1 + DAMAGED_A_VALUE:
                progress.update(
                    task, completed=seconds - max(0.0, deadline - time.monotonic()), description=summary(seen)
                )

        while time.monotonic() < deadline:
            run()
    print(f"{summary(seen)}; nothing but DecodeError was raised, and all that was decoded is as it must be")


def damaged(raw: bytes, seed: int) -> Iterator[bytes]:
    """Change, remove or insert some bytes: far cheaper than a new example of hypothesis."""
    dice = random.Random(seed)
    for _ in range(DAMAGED_A_VALUE):
        value = bytearray(raw)
        for _ in range(dice.randint(1, 3)):
            at = dice.randint(0, len(value))
            value[at : at + dice.randint(0, 3)] = dice.choice(PIECES) if dice.random() < 0.5 else dice.randbytes(1)
        yield bytes(value)


def summary(seen: Counter[str]) -> str:
    return f"{seen.total():,} executions: {seen['decoded']:,} decoded, {seen['refused']:,} refused"


if __name__ == "__main__":
    warnings.simplefilter("ignore", HypothesisWarning)
    sys.exit(main())
