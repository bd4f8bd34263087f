"""Metrics of an OpenTelemetry Collector: a resource is an agent, a metric with its attributes a key."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Literal

from pipeline.core.decoding import Decoded
from pipeline.core.report import MAX_REPORT_KEYS_BYTES, Entry, Report, apply_limits, key_problem, moment_from_us
from pipeline.core.values import as_text, utf8_length
from pipeline.errors import DecodeError
from pipeline.formats.otlp.config import OtlpConfig
from pipeline.formats.otlp.messages import NO_RECORDED_VALUE, json_reader, proto_reader

OtlpEncoding = Literal["otlp_json", "otlp_proto"]


class OtlpReader:
    """Reads reports out of a Collector's records; a record has those of several resources."""

    def __init__(self, encoding: OtlpEncoding, config: OtlpConfig | None = None) -> None:
        """Prepare for an encoding, as the Collector's kafka exporter calls it.

        Raises:
            ConfigError: the packages for it are not installed.
        """
        config = config or OtlpConfig()
        self._read: Callable[[bytes], Any] = json_reader() if encoding == "otlp_json" else proto_reader()
        self._ids = config.id
        self._include = None if config.include is None else frozenset(config.include)
        self._exclude = frozenset(config.exclude or ())

    def decode(self, raw: bytes | None) -> Decoded:
        """Return the reports in a record's value, within the limits, and why a part of it was left out, if it was.

        Raises:
            DecodeError: it holds no metrics, or none of a resource with an id.
        """
        if raw is None:
            raise DecodeError("the record has no value (a tombstone)")
        reports: list[Report] = []
        problem: str | None = None
        refused: deque[str] = deque(maxlen=1)
        for item in self._read(raw).resource_metrics:
            agent_id = self._agent_id(item.resource.attributes)
            if agent_id is None:
                problem = f"a resource without an id: it has none of the attributes {', '.join(self._ids)}"
                continue
            entries = (
                entry
                for scope in item.scope_metrics
                for metric in scope.metrics
                for entry in self._entries(metric, refused)
            )
            reports += _reports(agent_id, entries)
        if problem is not None and not reports:
            raise DecodeError(problem)
        for report in reports:
            problem = apply_limits(report) or problem
        return Decoded(reports, refused[0] if refused else problem)

    def _agent_id(self, attributes: Iterable[Any]) -> str | None:
        found = {attribute.key: attribute.value for attribute in attributes if attribute.key in self._ids}
        texts = (as_text(_plain(found[name])) for name in self._ids if name in found)
        return next((text for text in texts if text), None)

    def _entries(self, metric: Any, refused: deque[str]) -> Iterator[Entry]:
        """Make the entries whose keys the table can hold; add to `refused` why it can't hold the others.

        All entries of a record are held at once, and each has a key of its own: without this check a long name with
        many points would fill the memory.
        """
        kind = metric.WhichOneof("data")
        points = () if kind is None else getattr(metric, kind).data_points
        name = metric.name
        if points and (problem := key_problem(name)) is not None:
            refused.append(problem)
            return
        for point in points:
            key = self._key(name, point.attributes)
            if (problem := key_problem(key)) is not None:
                refused.append(problem)
                continue
            moment = moment_from_us(point.time_unix_nano // 1000) if point.time_unix_nano else None
            value = "" if point.flags & NO_RECORDED_VALUE else _VALUES[kind](point)
            yield Entry(key, value, "", moment)

    def _key(self, name: str, attributes: Iterable[Any]) -> str:
        taken = [item for item in attributes if self._is_taken(item.key)]
        if not taken:
            return name
        return f"{name}{{{','.join(sorted(f'{item.key}={as_text(_plain(item.value))}' for item in taken))}}}"

    def _is_taken(self, attribute: str) -> bool:
        return attribute not in self._exclude if self._include is None else attribute in self._include


def _reports(agent_id: str, entries: Iterable[Entry]) -> Iterator[Report]:
    """Divide entries among reports, each with no more keys than one may have."""
    report, total = Report(agent_id, []), 0
    for entry in entries:
        size = utf8_length(entry.key)
        if total + size > MAX_REPORT_KEYS_BYTES and report.entries:
            yield report
            report, total = Report(agent_id, []), 0
        report.entries.append(entry)
        total += size
    yield report


def _number(point: Any) -> str:
    name = point.WhichOneof("value")
    return "" if name is None else as_text(getattr(point, name))


def _histogram(point: Any) -> str:
    """Return count, sum, least and greatest value as JSON; buckets are left out."""
    optional = {name: getattr(point, name) for name in ("sum", "min", "max") if point.HasField(name)}
    return as_text({"count": point.count, **optional})


def _summary(point: Any) -> str:
    quantiles = {as_text(item.quantile): item.value for item in point.quantile_values}
    return as_text({"count": point.count, "sum": point.sum or 0.0, "quantiles": quantiles})


_VALUES: Final[dict[str, Callable[[Any], str]]] = {
    "gauge": _number,
    "sum": _number,
    "histogram": _histogram,
    "exponential_histogram": _histogram,
    "summary": _summary,
}


def _plain(value: Any) -> object:
    """Return an attribute's value as JSON would have it."""
    name = value.WhichOneof("value")
    if name is None:
        return None
    found = getattr(value, name)
    if name == "array_value":
        return [_plain(item) for item in found.values]
    if name == "kvlist_value":
        return {item.key: _plain(item.value) for item in found.values}
    return found
