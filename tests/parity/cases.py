"""metadatabatcher's own test cases, as data: what goes in, when the clock moves, and what must have come out.

CASES end as they do there, DIFFERENCES as they do here: docs/metadatabatcher.md has the reasons. Times are seconds
after T0 = 2024-01-01T00:00:00Z, where its clock starts too. "flushed" counts entries of flushed batches (its
metadata_flushed_total); "told" are the agents of all notifications since the last look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Text = str | tuple[str, str]  # a value, or (value, error)


@dataclass(frozen=True)
class Add:
    """One report of an agent, collected at `at`: one time, one per key, or None for the server's.

    `values` is a mapping, or pairs where a key comes twice. `refused` is what the error says, if there has to be one.
    """

    agent: int
    values: Mapping[str, Text] | Sequence[tuple[str, Text]]
    at: float | Sequence[float] | None
    is_declared: bool = True
    refused: str | None = None

    @property
    def pairs(self) -> list[tuple[str, Text]]:
        return list(self.values.items()) if isinstance(self.values, Mapping) else list(self.values)


@dataclass(frozen=True)
class AddAtOnce:
    """As many threads as agents, each with that many reports of one key of its own."""

    agents: range
    reports: int


@dataclass(frozen=True)
class Advance:
    """The clock moves on."""

    seconds: float


@dataclass(frozen=True)
class Expect:
    """What must hold now: batches by reason so far, entries flushed so far, agents told since the last look, rows.

    `sizes` and `utilization` are (count, sum) of metadatabatcher's histograms; `never` are pairs that have a row
    without a value yet.
    """

    batches: dict[str, int]
    flushed: int
    told: set[int] = field(default_factory=set)
    rows: dict[tuple[int, str], tuple[Text, float | None]] | None = None
    payload_ids: list[int] | None = None
    sizes: tuple[int, int] | None = None
    utilization: tuple[int, int] | None = None
    never: set[tuple[int, str]] = field(default_factory=set)


@dataclass(frozen=True)
class Close:
    """The batcher is closed."""


@dataclass(frozen=True)
class Block:
    """The database doesn't answer: somebody holds the table."""


@dataclass(frozen=True)
class Fail:
    """The database refuses to write."""


@dataclass(frozen=True)
class FailNotify:
    """The database refuses NOTIFY alone."""


@dataclass(frozen=True)
class Tried:
    """A write has been tried, and waits or has failed."""


@dataclass(frozen=True)
class Restore:
    """The database works again."""


@dataclass(frozen=True)
class Case:
    """A named run; `batch` is the batch size, 500 unless given, and also the window's capacity, unless given."""

    name: str
    steps: list[Any]
    batch: int = 500
    capacity: int | None = None
    undeclared: str = "ignore"


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
            Expect(
                {"scheduled": 2, "capacity": 1},
                507,
                set(range(1000, 1500)),
                payload_ids=[363, 137],
                sizes=(3, 507),
                utilization=(1 + 2 + 500, 507),
            ),
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
            Expect({"capacity": 1}, 100, {1}, payload_ids=[1], sizes=(1, 100), utilization=(1, 100)),
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
        "the timer restarts at a capacity flush",
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
    *(
        Case(
            f"{agents} agents in one batch",
            [
                *(Add(number, {"key1": "v"}, 0) for number in range(agents)),
                Expect({"capacity": 1}, agents, set(range(agents)), payload_ids=ids),
            ],
            batch=agents,
        )
        for agents, ids in (
            (1, [1]),
            (3, [3]),
            (363, [363]),
            (364, [363, 1]),
            (600, [363, 237]),
            (1000, [363, 363, 274]),
        )
    ),
    Case("no keys are no report", [Add(1, {}, 0), Add(1, {"a": "1"}, 0), Expect({"capacity": 1}, 1, {1})], batch=1),
    Case(
        "too long values and errors",
        [
            Add(
                1,
                {
                    "value kept": "a" * 2048,
                    "value cut": "a" * 2049,
                    "error kept": ("", "a" * 2048),
                    "error replaced": ("", "a" * 2049),
                },
                0,
            ),
            Expect(
                {"capacity": 1},
                4,
                {1},
                {
                    (1, "value kept"): ("a" * 2048, 0),
                    (1, "value cut"): (("a" * 2048, "value of 2049 bytes exceeded 2048 bytes"), 0),
                    (1, "error kept"): (("", "a" * 2048), 0),
                    (1, "error replaced"): (("", "error of 2049 bytes exceeded 2048 bytes"), 0),
                },
            ),
        ],
        batch=4,
    ),
    Case(
        "value and error too long: the error's words win",
        [
            Add(1, {"k": ("a" * 4096, "b" * 4096)}, 0),
            Expect({"capacity": 1}, 1, {1}, {(1, "k"): (("a" * 2048, "error of 4096 bytes exceeded 2048 bytes"), 0)}),
        ],
        batch=1,
    ),
    Case(
        "keys over 6,144 bytes together: what came before is kept, and an error",
        [
            Add(1, {f"{number:0100}": "v" for number in range(63)}, 0, refused="keys exceeded 6144 bytes"),
            Expect({"capacity": 1}, 61, {1}),
        ],
        batch=61,
    ),
    Case(
        "the server's time for all keys, where the agent gives none",
        [
            Add(1, {"a": "1", "b": ("", "timed out")}, None),
            Expect({"capacity": 1}, 2, {1}, {(1, "a"): ("1", None), (1, "b"): (("", "timed out"), None)}),
        ],
        batch=2,
    ),
    Case(
        "an undeclared key: success, and nothing stored",
        [
            Add(1, {"unknown": "1"}, 0, is_declared=False),
            Add(1, {"known": "2"}, 0),
            Expect({"capacity": 1}, 2, {1}, {(1, "known"): ("2", 0)}),
        ],
        batch=2,
    ),
    Case(
        "a row without a value yet has no time",
        [
            Add(1, {"a": "1"}, 0),
            Expect({"capacity": 1}, 1, {1}, never={(1, "b")}),
            Add(1, {"b": "1"}, 0),
            Expect({"capacity": 2}, 2, {1}),
        ],
        batch=1,
    ),
    Case(
        "nothing is trimmed",
        [
            Add(1, {"k": (" 12% \n", "\twarn ")}, 0),
            Expect({"capacity": 1}, 1, {1}, {(1, "k"): ((" 12% \n", "\twarn "), 0)}),
        ],
        batch=1,
    ),
    Case(
        "a key twice in one report: the last",
        [
            Add(1, [("k", "first"), ("k", "last"), ("l", "v")], 0),
            Expect({"capacity": 1}, 2, {1}, {(1, "k"): ("last", 0), (1, "l"): ("v", 0)}),
        ],
        batch=2,
    ),
    Case(
        "unequal lengths: an error, and nothing queued",
        [
            Add(1, {"k": "v", "l": "w"}, [0], refused="must have the same length"),
            Add(1, {"k": "1"}, 0),
            Expect({"capacity": 1}, 1, {1}, {(1, "k"): ("1", 0)}),
        ],
        batch=1,
    ),
    Case(
        "added at once by threads",
        [AddAtOnce(range(8), 50), Advance(5), Expect({"scheduled": 1}, 400, set(range(8)), sizes=(1, 400))],
    ),
]

DIFFERENCES = [
    Case(
        "waits while the store is busy",
        [
            Add(1, {"key1": "value1"}, 0),
            Add(2, {"key1": "value2"}, 0),
            Expect({"capacity": 1}, 2, {1, 2}),
            Block(),
            *(Add(100 + number, {"key1": f"value{number}"}, 0) for number in range(10)),
            Add(200, {"key1": "dropped"}, 0),
            Tried(),
            Expect({"capacity": 1}, 2),
            Restore(),
            Expect({"capacity": 6}, 12, set(range(100, 110))),
            Advance(5),
            Expect({"capacity": 6, "scheduled": 1}, 13, {200}),
        ],
        batch=2,
    ),
    Case(
        "a failed flush is tried again",
        [
            Fail(),
            Add(1, {"key1": "value1", "key2": "value2"}, 0),
            Tried(),
            Expect({}, 0, rows={}, sizes=(0, 0), utilization=(0, 0)),
            Restore(),
            Expect(
                {"capacity": 1}, 2, {1}, {(1, "key1"): ("value1", 0), (1, "key2"): ("value2", 0)}, utilization=(1, 2)
            ),
        ],
        batch=2,
    ),
    Case(
        "NOTIFY fails, and so does the write",
        [
            FailNotify(),
            *(Add(number, {"key1": "v"}, 0) for number in range(400)),
            Tried(),
            Expect({}, 0, rows={}),
            Restore(),
            Expect({"capacity": 1}, 400, set(range(400)), payload_ids=[363, 37]),
        ],
        batch=400,
    ),
    Case(
        "an older value in a later batch",
        [
            Add(1, {"key1": "newer"}, 2),
            Expect({"capacity": 1}, 1, {1}),
            Add(1, {"key1": "older"}, 1),
            Expect({"capacity": 2}, 2, set(), {(1, "key1"): ("newer", 2)}),
        ],
        batch=1,
    ),
    Case(
        "close brings everything out",
        [
            Block(),
            *(Add(number, {"key1": "v"}, 0) for number in range(13)),
            Tried(),
            Close(),
            Restore(),
            Expect(
                {"capacity": 6, "shutdown": 1}, 13, set(range(13)), {(number, "key1"): ("v", 0) for number in range(13)}
            ),
        ],
        batch=2,
    ),
    Case(
        "text that Postgres can't store",
        [
            Add(1, {"k": "a\0b"}, 0),
            Add(2, {"k": "a" + "é" * 1024}, 0),
            Add(3, {"k": "fine"}, 0),
            Expect(
                {"capacity": 1},
                3,
                {1, 2, 3},
                {
                    (1, "k"): ("a\ufffdb", 0),
                    (2, "k"): (("a" + "é" * 1023, "value of 2049 bytes exceeded 2048 bytes"), 0),
                    (3, "k"): ("fine", 0),
                },
            ),
        ],
        batch=3,
    ),
    Case(
        "a window larger than a batch",
        [
            Add(1, {"a": "1", "b": "1", "c": "1"}, 0),
            Add(1, {"a": "2"}, 1),
            Advance(5),
            Expect({"scheduled": 2}, 3, {1}, {(1, "a"): ("2", 1), (1, "b"): ("1", 0), (1, "c"): ("1", 0)}),
        ],
        batch=2,
        capacity=50_000,
    ),
    Case(
        "a report larger than a batch",
        [
            Add(1, {"a": "1", "b": "1", "c": "1"}, 0),
            Expect({"capacity": 2}, 3, {1}, sizes=(2, 3)),
            Add(1, {"d": "1"}, 0),
            Advance(5),
            Expect({"capacity": 2, "scheduled": 1}, 4, {1}),
        ],
        batch=2,
    ),
    Case(
        "an agent without rows, or with the same rows",
        [
            Add(1, {"k": "v"}, 0, is_declared=False),
            Expect({"capacity": 1}, 1, set(), {}),
            Add(2, {"k": "v"}, 0),
            Expect({"capacity": 2}, 2, {2}),
            Add(2, {"k": "v"}, 0),
            Expect({"capacity": 3}, 3, set(), {(2, "k"): ("v", 0)}),
        ],
        batch=1,
    ),
    Case(
        "a new pair becomes a row",
        [
            Add(1, {"new": "v"}, 0, is_declared=False),
            Expect({"capacity": 1}, 1, {1}, {(1, "new"): ("v", 0)}),
        ],
        batch=1,
        undeclared="insert",
    ),
    Case(
        "the agent's own times",
        [
            Add(1, {"a": "1", "b": ("", "timed out")}, [-10, -3]),
            Expect({"capacity": 1}, 2, {1}, {(1, "a"): ("1", -10), (1, "b"): (("", "timed out"), -3)}),
        ],
        batch=2,
    ),
]
