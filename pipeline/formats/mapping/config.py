"""The settings table `[mapping]`: where the parts of a report are in the records of a foreign topic."""

from __future__ import annotations

from typing import Annotated, Final, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipeline.formats.mapping.paths import Path, parse_path
from pipeline.formats.mapping.times import TimeFormat

_SOURCES: Final = {"header": "a header", "key": "the record key", "timestamp": "the record's timestamp"}


def _is_path(text: str) -> str:
    parse_path(text)
    return text


def _are_paths(paths: object) -> object:
    found = paths if isinstance(paths, list) else [paths]
    if not found:
        raise ValueError("must be a path, or a list of paths")
    for path in found:
        if not isinstance(path, str):
            raise ValueError("must be a path, or a list of paths")
        parse_path(path)
    return paths


PathText = Annotated[str, AfterValidator(_is_path)]
Names = Annotated[list[str], Field(min_length=1)]


class MappingConfig(BaseModel):
    """Where id, entries and times are. What can't be right in any record is refused when an instance is made.

    Shapes, by the fields that are set: with `entries` and `key`, a list of objects; with `entries` alone, an object
    whose fields are the keys; with `key` and `value` alone, each record is one entry. With `entries`, the paths of
    `key`, `value`, `error` and `entry_time` begin at each entry; all others at the record's value.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str | list[str], BeforeValidator(_are_paths)]
    id_separator: str = "/"
    time: PathText | None = None
    time_format: TimeFormat = "rfc3339"
    entries: PathText | None = None
    key: PathText | None = None
    value: PathText | None = None
    error: PathText | None = None
    entry_time: PathText | None = None
    include: Names | None = None
    exclude: Names | None = None

    def __str__(self) -> str:
        return self.model_dump_json(exclude_unset=True)

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if problem := self._problem():
            raise ValueError(problem)
        return self

    def _problem(self) -> str | None:
        if self.entries is None:
            if self.key is None or self.value is None:
                return "say where the entries are: entries; or, where each record is one entry, key and value"
            if self.entry_time is not None:
                return "entry_time is for the elements of entries; without entries, use time"
        elif self.key is not None and self.value is None:
            return "key without value: say where the value of each of the entries is"
        elif self.value is None and (self.error is not None or self.entry_time is not None):
            return "error and entry_time need value: where the value is in each of the entries"
        if self.include is not None and self.exclude is not None:
            return "include and exclude exclude each other: include names all keys that are taken"
        if "time_format" in self.model_fields_set and self.time is None and self.entry_time is None:
            return "time_format without time or entry_time"
        return self._misplaced()

    def _misplaced(self) -> str | None:
        inside = ("entries",) if self.entries is None else ("entries", "key", "value", "error", "entry_time")
        for name in inside:
            path = self.path(name)
            if path is not None and path.source != "value":
                where = "each of the entries" if name != "entries" else "the record's value"
                return f"{name} = {path.text!r} is {_SOURCES[path.source]}, but {name} is read from {where}"
        for path in self.id_paths:
            if path.source == "timestamp":
                return "id can't be the record's timestamp"
        for name in ("key", "value", "error"):
            path = self.path(name)
            if path is not None and path.source == "timestamp":
                return f"{name} can't be the record's timestamp"
        if self.key == "." and self.entries is not None:
            return "key = '.' is each of the entries as a whole: name the field that holds the key"
        return None

    @property
    def left_out(self) -> frozenset[str]:
        """The keys that become no entries: `exclude`, and the fields of the entries' object that have id or time."""
        names = set(self.exclude or ())
        entries, time = self.path("entries"), self.path("time")
        if entries is not None and self.key is None:
            for path in [*self.id_paths, *([time] if time else [])]:
                if path.source == "value" and path.steps[:-1] == entries.steps and path.steps:
                    names.add(path.steps[-1])
        return frozenset(names)

    @property
    def id_paths(self) -> list[Path]:
        """The paths of `id`, parsed."""
        return [parse_path(text) for text in ([self.id] if isinstance(self.id, str) else self.id)]

    def path(self, name: str) -> Path | None:
        """Return the path in a field, parsed, or None if it is not set."""
        text = getattr(self, name)
        return None if text is None else parse_path(text)
