"""The latest entry per pair of a topic's records: of events by the worker's rules, of batches by the sink's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Literal, Protocol

from pipeline.core.batch import Batch, Row, decode_batch, separate_unstorable
from pipeline.core.decoding import RecordDecoder, fold_loading
from pipeline.core.record import Record
from pipeline.core.report import AgentIds
from pipeline.core.window import OpenWindow
from pipeline.errors import DecodeError

ReplaySource = Literal["events", "batches"]
Pair = tuple[str, str]
KeepPair = Callable[[str, str], bool]


class Fold(Protocol):
    """The latest entry per pair of what was folded so far.

    `dead` counts what could not be used; nothing is dead-lettered, as the live pipeline has done that.
    """

    dead: int

    def fold(self, records: Sequence[Record], start: int) -> int:
        """Fold `records[start:]`, of one record batch, until the capacity is reached; return the next index.

        Raises:
            NewerVersion: it must not be skipped, as it may hold the latest entries.
            ServiceUnavailable, ConfigError: the schema registry does not answer, or refuses us.
        """
        ...

    @property
    def entries(self) -> int:
        """How many entries were folded."""
        ...

    @property
    def pairs(self) -> int:
        """How many unique pairs are in memory."""
        ...

    def retain(self, keep: KeepPair) -> None:
        """Forget every pair but those that `keep(agent_id, key)` accepts."""
        ...

    def rows(self) -> list[Row]:
        """Return the rows, sorted by pair."""
        ...

    @property
    def names(self) -> Mapping[str, str]:
        """The names, by id, of agents in the rows that are called by one."""
        ...


class EventsFold:
    """Folds the events topic in one window that never closes early."""

    def __init__(self, capacity: int, *, max_clock_skew: timedelta, decoder: RecordDecoder) -> None:
        self._decoder = decoder
        self._window = OpenWindow(0.0, capacity=capacity, max_clock_skew=max_clock_skew, decoder=decoder)
        self.dead = 0

    def fold(self, records: Sequence[Record], start: int) -> int:
        """See Fold; `dead` counts records."""
        index = fold_loading(self._window, self._decoder, records, start)
        self.dead += self._window.drop_rejected()
        return index

    @property
    def entries(self) -> int:
        """How many entries of reports were folded."""
        return self._window.entries

    @property
    def pairs(self) -> int:
        """How many unique pairs are in memory."""
        return self._window.pairs

    def retain(self, keep: KeepPair) -> None:
        """Forget every pair but those to keep."""
        self._window.retain(keep)

    def rows(self) -> list[Row]:
        """Return the rows, sorted by pair."""
        return self._window.close("shutdown", 0.0).rows

    @property
    def names(self) -> Mapping[str, str]:
        """The names of agents in the rows."""
        return self._window.names


class BatchesFold:
    """Folds the batches topic; in a tie the later row wins."""

    def __init__(self, capacity: int, *, agent_ids: AgentIds) -> None:
        self._capacity = capacity
        self._agent_ids = agent_ids
        self._newest: dict[Pair, Row] = {}
        self._entries = 0
        self.names: dict[str, str] = {}
        self.dead = 0

    def fold(self, records: Sequence[Record], start: int) -> int:
        """See Fold; `dead` counts records, and rows of batches whose agent id is not a UUID or time not storable."""
        for index in range(start, len(records)):
            if len(self._newest) >= self._capacity:
                return index
            try:
                self._take(decode_batch(records[index].value))
            except DecodeError:
                self.dead += 1
        return len(records)

    def _take(self, batch: Batch) -> None:
        newest, known = self._newest, self._agent_ids.known
        self._entries += len(batch.agent_ids)
        batch, unstorable = separate_unstorable(batch)
        self.dead += len(unstorable)
        self.names.update(batch.names)
        for text, key, value, error, collected_at_us in zip(*batch.columns, strict=True):
            try:
                agent_id = known.get(text) or self._agent_ids.learn(text)
            except DecodeError:
                self.dead += 1
                continue
            previous = newest.get((agent_id, key))
            if previous is None or collected_at_us >= previous.collected_at_us:
                newest[agent_id, key] = Row(agent_id, key, value, error, collected_at_us)

    @property
    def entries(self) -> int:
        """How many rows of batches were folded."""
        return self._entries

    @property
    def pairs(self) -> int:
        """How many unique pairs are in memory."""
        return len(self._newest)

    def retain(self, keep: KeepPair) -> None:
        """Forget every pair but those to keep."""
        self._newest = {pair: row for pair, row in self._newest.items() if keep(*pair)}
        agent_ids = {agent_id for agent_id, _ in self._newest}
        self.names = {agent_id: name for agent_id, name in self.names.items() if agent_id in agent_ids}

    def rows(self) -> list[Row]:
        """Return the rows, sorted by pair."""
        return sorted(self._newest.values())
