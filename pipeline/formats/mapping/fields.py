"""The fast way for the usual record, worth a parser of its own: it takes three quarters of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.core.report import Entry, Report
from pipeline.formats.mapping.texts import text_of


def fields_and_head(
    decode: Callable[[bytes], Any],
    head_of: Callable[[Any], Any] | None,
    fields_of: Callable[[Any], Any] | None,
    left_out: tuple[str, ...],
) -> Callable[[bytes], Report]:
    """Return the parser of records with an object that holds the id, and perhaps the time, and one with the entries.

    `head_of` and `fields_of` take these from what `decode` returns; None: they are its `head` and its `entries`. The
    first serves as the report.
    """

    def parse(raw: bytes) -> Report:
        record = decode(raw)
        report = record.head if head_of is None else head_of(record)
        if report.agent_id.__class__ is not str:
            report.agent_id = str(report.agent_id)
        fields = record.entries if fields_of is None else fields_of(record)
        if left_out:
            for name in left_out:
                fields.pop(name, None)
        report.entries = entries = []
        for key, value in fields.items():
            entries.append(Entry(key, value if value.__class__ is str else text_of(value)))
        return report  # type: ignore[no-any-return]  # a struct with a report's fields

    return parse
