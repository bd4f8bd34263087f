"""A batch: a part of a closed window, as columns, with the range of source offsets that the window covers."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import Annotated, Any, Final, Literal, NamedTuple, get_args

import msgspec

from pipeline.core.report import MAX_AGENT_CHARS, PARSE_ERRORS, clamp_us, moment_from_us
from pipeline.errors import DecodeError, NewerVersion

# Why a window closed. `scheduled`, `capacity` and `shutdown` are metadatabatcher's labels; `revoked` is ours (a
# rebalance). A newer worker may have others.
Reason = Literal["scheduled", "capacity", "shutdown", "revoked"]
_REASONS: Final = frozenset(get_args(Reason))

# Raised by a change that a sink must know of to apply a batch rightly; not by a new field that it may ignore. All
# versions up to this one are read, so that new sinks work with old workers.
BATCH_VERSION: Final = 1
# Kafka refuses records over 1,048,588 bytes by default; this leaves room for the source, the window and headers.
MAX_COLUMNS_BYTES: Final = 900_000
# A character takes at most six bytes of JSON (a control character: \\u001f), and a row 110 more bytes:
# the quoted id, a 17-digit time, separators.
_MAX_JSON_BYTES_PER_CHAR: Final = 6
_ROW_BYTES: Final = 110
_NAME_CHARS: Final = 42  # what a name takes besides itself: the quoted id, separators


class Row(NamedTuple):
    """The latest value of one (agent_id, key)."""

    agent_id: str
    key: str
    value: str
    error: str
    collected_at_us: int

    @property
    def collected_at(self) -> datetime:
        """The time as a datetime, clamped to years 1 to 9999."""
        return moment_from_us(self.collected_at_us)


class Columns(NamedTuple):
    """Rows column by column, as unnest takes them: lists of equal length."""

    agent_ids: list[str]
    keys: list[str]
    values: list[str]
    errors: list[str]
    collected_at_us: list[int]

    def part(self, start: int, end: int) -> Columns:
        """Return the rows from `start` up to, not including, `end`."""
        return self._map(lambda column: column[start:end])

    def pick(self, indexes: Sequence[int]) -> Columns:
        """Return the rows at these indexes, in the order of the indexes."""
        return self._map(lambda column: [column[index] for index in indexes])

    def extend(self, more: Columns) -> None:
        """Append rows in place."""
        for name in self._fields:
            getattr(self, name).extend(getattr(more, name))

    def rows(self) -> Iterator[Row]:
        """Iterate over the rows."""
        return map(Row, *self)

    def _map(self, change: Callable[[list[Any]], list[Any]]) -> Columns:
        return Columns(*(change(getattr(self, name)) for name in self._fields))


# Within what Postgres can store, so that a batch can only fail because of its rows.
_Partition = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Offset = Annotated[int, msgspec.Meta(ge=0, lt=2**63 - 1)]
_Name = Annotated[str, msgspec.Meta(pattern=r"\A[^\0]*\Z")]
_AgentName = Annotated[str, msgspec.Meta(pattern=r"\A[^\0]+\Z", max_length=MAX_AGENT_CHARS)]
_AgentId = Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]


class Source(msgspec.Struct, frozen=True):
    """The source records a batch covers: offsets `first` to `last`, both included.

    `topic_id` is Kafka's own id of this incarnation of the topic; in another one the offsets mean nothing.
    """

    topic: _Name
    topic_id: _Name
    partition: _Partition
    first: _Offset
    last: _Offset


class WindowSpan(msgspec.Struct, frozen=True):
    """When a tumbling window opened and closed: [start, end), in microseconds of processing time."""

    start_us: int
    end_us: int


class Batch(msgspec.Struct, frozen=True):
    """Part `part` of `parts` of a window's rows; the source range counts as applied with the last part only.

    `reason` is a Reason, or the one of a newer worker. `names` has, by id, the names of those of its agents that are
    called by one. Shape: the five columns have the same length, as unnest requires.
    """

    source: Source
    window: WindowSpan
    reason: str
    part: int
    parts: int
    agent_ids: list[str]
    keys: list[str]
    values: list[str]
    errors: list[str]
    collected_at_us: list[int]
    version: int = BATCH_VERSION
    names: dict[_AgentId, _AgentName] = {}

    @property
    def reason_label(self) -> str:
        """The reason as a metric's label: "other" if this program doesn't know it."""
        return self.reason if self.reason in _REASONS else "other"

    @property
    def completes_source(self) -> bool:
        """Tell whether, with this part applied, the whole source range is."""
        return self.part == self.parts

    @property
    def sampled_time(self) -> float:
        """When one of the entries was collected, in seconds since the Unix epoch; its index varies between batches.

        Only for a batch whose rows are storable, and that has any.
        """
        return self.collected_at_us[(self.source.last + self.part) % len(self.collected_at_us)] / 1e6

    @property
    def columns(self) -> Columns:
        """The rows."""
        return Columns(self.agent_ids, self.keys, self.values, self.errors, self.collected_at_us)


class _Versioned(msgspec.Struct):
    """What is read of a batch that may be of any version."""

    version: int


_encode: Final = msgspec.json.Encoder().encode
_decoder: Final = msgspec.json.Decoder(Batch)
_version_decoder: Final = msgspec.json.Decoder(_Versioned)


def encode_batch(batch: Batch) -> bytes:
    """Encode a batch as the value of a Kafka record (UTF-8 JSON)."""
    return _encode(batch)


def decode_batch(raw: bytes | None) -> Batch:
    """Decode one record of the batches topic.

    Raises:
        NewerVersion: its `version` is a later one than this program reads, whatever else it holds.
        DecodeError: not a batch; the message is the reason for the dead letter.
    """
    try:
        batch = _decoder.decode(raw)  # type: ignore[arg-type]  # None raises TypeError
    except PARSE_ERRORS as error:
        with contextlib.suppress(*PARSE_ERRORS):
            _refuse_version(_version_decoder.decode(raw).version)  # type: ignore[arg-type]  # as above
        raise DecodeError(f"not a batch: {error}") from error
    _refuse_version(batch.version)
    lengths = {len(column) for column in (batch.keys, batch.values, batch.errors, batch.collected_at_us)}
    if lengths != {len(batch.agent_ids)}:
        raise DecodeError(f"the batch's columns are of unequal lengths: {len(batch.agent_ids)}, {sorted(lengths)}")
    return batch


def _refuse_version(version: int) -> None:
    if version > BATCH_VERSION:
        raise NewerVersion(
            f"a batch of version {version}, and this program reads version {BATCH_VERSION}: upgrade the sinks first, "
            "and this program with them"
        )
    if version < 1:
        raise DecodeError(f"a batch of version {version}: versions begin at 1")


def separate_unstorable(batch: Batch) -> tuple[Batch, list[Batch]]:
    """Return the batch without its rows that are not storable, and a batch of one row for each of those.

    Storable are times in years 1 to 9999: Postgres holds others, which its readers can't represent. Our own workers
    make no such rows, as they clamp times.
    """
    times = batch.collected_at_us
    if not times or (_is_storable(min(times)) and _is_storable(max(times))):
        return batch, []
    storable: list[int] = []
    unstorable: list[int] = []
    for index, time_us in enumerate(times):
        (storable if _is_storable(time_us) else unstorable).append(index)
    return _pick(batch, storable), [_pick(batch, [index]) for index in unstorable]


def unstorable_reason(collected_at_us: int) -> str:
    """Return the reason for the dead letter of a row that is not storable."""
    return f"a time outside the years 1 to 9999: collected_at_us is {collected_at_us}"


def _is_storable(time_us: int) -> bool:
    return clamp_us(time_us) == time_us


def _pick(batch: Batch, indexes: Sequence[int]) -> Batch:
    columns = batch.columns.pick(indexes)
    names = {agent_id: batch.names[agent_id] for agent_id in batch.names.keys() & columns.agent_ids}
    return msgspec.structs.replace(batch, **columns._asdict(), names=names)


def split(
    rows: Sequence[Row],
    *,
    source: Source,
    window: WindowSpan,
    reason: Reason,
    batch_size: int,
    names: Mapping[str, str] | None = None,
) -> list[Batch]:
    """Cut a closed window into batches of at most `batch_size` rows and about 900 kB of JSON, in row order.

    Guarantee: every row is in exactly one part, with its agent's name from `names`, if that has it; no rows give no
    parts.
    """
    names = names or {}
    parts = list(_parts(rows, batch_size, names))
    batches = []
    for number, part in enumerate(parts, start=1):
        agent_ids, keys, values, errors, collected_at_us = (list(column) for column in zip(*part, strict=True))
        named = {agent_id: names[agent_id] for agent_id in dict.fromkeys(agent_ids) if agent_id in names}
        columns = (agent_ids, keys, values, errors, collected_at_us)
        batches.append(Batch(source, window, reason, number, len(parts), *columns, names=named))
    return batches


def _parts(rows: Sequence[Row], batch_size: int, names: Mapping[str, str]) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        chars = sum([len(row.key) + len(row.value) + len(row.error) for row in part])
        if names:  # each at most once, but at most as often as this
            chars += sum([len(names.get(row.agent_id, "")) + _NAME_CHARS for row in part])
        if chars * _MAX_JSON_BYTES_PER_CHAR + len(part) * _ROW_BYTES <= MAX_COLUMNS_BYTES:
            yield part
        else:
            yield from _parts_by_size(part, names)


def _parts_by_size(rows: Sequence[Row], names: Mapping[str, str]) -> Iterator[Sequence[Row]]:
    start, total = 0, 0
    for index, row in enumerate(rows):
        size = _ROW_BYTES + len(_encode((row.key, row.value, row.error)))
        if row.agent_id in names:
            size += _NAME_CHARS + len(_encode(names[row.agent_id]))
        if total + size > MAX_COLUMNS_BYTES and index > start:
            yield rows[start:index]
            start, total = index, 0
        total += size
    yield rows[start:]


def merge(batches: Iterable[Batch]) -> Columns:
    """Merge batches, given in topic order, into one row per pair, sorted by (agent_id, key).

    Guarantee: the newest collected_at wins, in a tie the later arrival (metadatabatcher's rule).
    Sorted, as this is the order in which rows are locked: two writers of the same rows must not deadlock.
    """
    merged = Columns([], [], [], [], [])
    for batch in batches:
        merged.extend(batch.columns)
    pairs = list(zip(merged.agent_ids, merged.keys, strict=True))
    if all(map(operator.lt, pairs, islice(pairs, 1, None))):
        return merged  # the usual case, parts of one window: already sorted, each pair once
    times = merged.collected_at_us
    newest: dict[tuple[str, str], int] = {}
    for index, pair in enumerate(pairs):
        held = newest.setdefault(pair, index)
        if held != index and times[index] >= times[held]:
            newest[pair] = index
    return merged.pick([newest[pair] for pair in sorted(newest)])
