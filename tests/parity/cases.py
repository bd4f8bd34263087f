"""metadatabatcher's own test cases, as data: what goes in, when the clock moves, and what must have come out.

Times are seconds after T0 = 2024-01-01T00:00:00Z, where its clock starts too. "flushed" counts entries of flushed
batches (its metadata_flushed_total); "told" are the agents of all notifications since the last look.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Add:
    """One report of an agent: keys and values, collected at `at`."""

    agent: int
    values: dict[str, str]
    at: float


@dataclass(frozen=True)
class Advance:
    """The clock moves on."""

    seconds: float


@dataclass(frozen=True)
class Expect:
    """What must be so now: batches by reason so far, entries flushed so far, agents told since the last look, rows."""

    batches: dict[str, int]
    flushed: int
    told: set[int] = field(default_factory=set)
    rows: dict[tuple[int, str], tuple[str, float]] | None = None
    payload_ids: list[int] | None = None


@dataclass(frozen=True)
class Close:
    """The batcher is closed."""


@dataclass(frozen=True)
class Case:
    """A named run; `batch` is the batch size, 500 unless said."""

    name: str
    steps: list[Any]
    batch: int = 500


CASES = [
    Case(
        "T1 lifecycle",
        [
            Advance(5),
            Expect({}, 0),
            Add(1, {"key1": "value1", "key2": "value2"}, 5),
            Advance(5),
            Expect({"scheduled": 1}, 2, {1}, {(1, "key1"): ("value1", 5), (1, "key2"): ("value2", 5)}),
            Add(1, {"key1": "new_value1", "key2": "new_value2", "key3": "new_value3"}, 10),
            Add(2, {"key1": "agent2_value1", "key2": "agent2_value2"}, 10),
            Advance(5),
            Expect(
                {"scheduled": 2},
                7,
                {1, 2},
                {
                    (1, "key1"): ("new_value1", 10),
                    (1, "key2"): ("new_value2", 10),
                    (1, "key3"): ("new_value3", 10),
                    (2, "key1"): ("agent2_value1", 10),
                    (2, "key2"): ("agent2_value2", 10),
                },
            ),
            *(Add(number, {"key1": "bulk_value"}, 15) for number in range(1000, 1500)),
            Expect({"scheduled": 2, "capacity": 1}, 507, set(range(1000, 1500)), payload_ids=[363, 137]),
        ],
    ),
    Case(
        "T2 two batches of two",
        [
            Add(1, {"key1": "value1"}, 0),
            Add(2, {"key1": "value2"}, 0),
            Expect({"capacity": 1}, 2, {1, 2}),
            Add(1, {"key2": "value3"}, 0),
            Add(2, {"key2": "value4"}, 0),
            Expect({"capacity": 2}, 4, {1, 2}),
        ],
        batch=2,
    ),
    Case(
        "T3a a key twice in two adds",
        [
            Add(1, {"key1": "first_value"}, 1),
            Add(1, {"key1": "second_value"}, 1.001),
            Advance(5),
            Expect({"scheduled": 1}, 1, {1}, {(1, "key1"): ("second_value", 1.001)}),
        ],
    ),
    Case(
        "T3b some keys twice",
        [
            Add(1, {"key1": "value1", "key2": "value2"}, 1),
            Add(1, {"key1": "new_value1", "key3": "value3"}, 1.001),
            Advance(5),
            Expect(
                {"scheduled": 1},
                3,
                {1},
                {
                    (1, "key1"): ("new_value1", 1.001),
                    (1, "key2"): ("value2", 1),
                    (1, "key3"): ("value3", 1.001),
                },
            ),
        ],
    ),
    Case(
        "T4 out of order",
        [
            Add(1, {"key1": "newer_value"}, 1),
            Add(1, {"key1": "older_value"}, 0),
            Add(1, {"key1": "newest_value"}, 2),
            Advance(5),
            Expect({"scheduled": 1}, 1, {1}, {(1, "key1"): ("newest_value", 2)}),
        ],
    ),
    Case(
        "T7 capacity of one agent",
        [
            *(Add(1, {f"key{number}": f"value{number}"}, 0) for number in range(99)),
            Expect({}, 0),
            Add(1, {"key_at_capacity": "value_at_capacity"}, 0),
            Expect({"capacity": 1}, 100, {1}, payload_ids=[1]),
        ],
        batch=100,
    ),
    Case(
        "T8 replacements don't count",
        [
            Add(1, {"a": "1", "b": "1", "c": "1"}, 0),
            Add(1, {"d": "1", "e": "1"}, 0),
            Expect({"capacity": 1}, 5, {1}),
            Add(1, {"key1": "1"}, 1),
            Add(1, {"key1": "2"}, 1),
            Advance(5),
            Expect({"capacity": 1, "scheduled": 1}, 6, {1}),
        ],
        batch=5,
    ),
    Case(
        "tie: the later arrival",
        [
            Add(1, {"key1": "first"}, 1),
            Add(1, {"key1": "second"}, 1),
            Advance(5),
            Expect({"scheduled": 1}, 1, {1}, {(1, "key1"): ("second", 1)}),
        ],
    ),
    Case(
        "the timer begins anew at a capacity flush",
        [
            Advance(4),
            Add(1, {"a": "1", "b": "1"}, 4),
            Expect({"capacity": 1}, 2, {1}),
            Add(1, {"a": "2"}, 4.5),
            Advance(4),
            Expect({"capacity": 1}, 2),
            Advance(1),
            Expect({"capacity": 1, "scheduled": 1}, 3, {1}),
        ],
        batch=2,
    ),
    Case(
        "close flushes what is pending",
        [Add(1, {"a": "1", "b": "1", "c": "1"}, 0), Close(), Expect({"shutdown": 1}, 3, {1})],
    ),
    Case("close with nothing pending does nothing", [Close(), Expect({}, 0)]),
]
