"""From a record to the reports in it: our own JSON here, other formats in pipeline/formats."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from pipeline.core.record import Record
from pipeline.core.report import PARSE_ERRORS, AgentIds, AnyReport, Report, parse_any_report, parse_report, read_report
from pipeline.errors import DecodeError

if TYPE_CHECKING:
    from pipeline.core.window import OpenWindow

# A schema's number in its registry, or its GUID.
SchemaId = int | str
# What RecordDecoder.parse raises for a record that is not plain.
NOT_PLAIN: Final = (*PARSE_ERRORS, KeyError, DecodeError)


class SchemaNeeded(Exception):
    """A record can be decoded only with a schema that `RecordDecoder.load` has to fetch first."""

    def __init__(self, schema_id: SchemaId) -> None:
        super().__init__(f"schema {schema_id}")
        self.schema_id = schema_id


class Decoded(NamedTuple):
    """The reports in a record, within the limits of report.py and, if part of it was left out, the reason.

    Agents have the spelling of the record, and single keys are not checked.
    """

    reports: Sequence[Report]
    problem: str | None = None


class RecordDecoder:
    """Decodes the records of one partition, and knows its agents by their spellings; for one thread at a time.

    `parse(value)` is the fast way, by the record's value alone. It raises one of NOT_PLAIN for any record that is not
    plain, about which `decode` decides. What it returns is within the limits wherever the value has at most SHORT_BYTES
    and no backslash, and holds little more text than the value has bytes. `decode` may change `parse` for one that fits
    the records to come, until `reset`.
    """

    def __init__(self) -> None:
        self.agent_ids = AgentIds()
        self.parse: Callable[[bytes], Report] = parse_report

    def reset(self) -> None:
        """Begin with the usual records again, as a window does."""
        self.parse = parse_report

    def is_own_json(self, raw: bytes) -> bool:
        """Tell whether a value is, if anything, a report in our own JSON, in which an agent's id is found as text."""
        return True

    def decode(self, record: Record) -> Decoded:
        """Decode a record the careful way.

        Raises:
            DecodeError: it holds no report; the message is the reason for the dead letter.
            SchemaNeeded: load the schema, then decode it again.
        """
        report, problem = read_report(record.value)
        if isinstance(report, AnyReport):
            self.parse = parse_any_report
        return Decoded([report], problem)

    def load(self, schema_id: SchemaId) -> None:
        """Fetch a schema that `decode` needs; blocks.

        Raises:
            ServiceUnavailable: the registry does not answer; try again.
            ConfigError: the registry refuses us.
        """
        raise NotImplementedError(f"our own JSON needs no schema {schema_id}")


def fold_loading(window: OpenWindow, decoder: RecordDecoder, records: Sequence[Record], start: int = 0) -> int:
    """Fold as `window.fold` does and load the schemas that are needed meanwhile, for readers that may block.

    Raises:
        ServiceUnavailable, ConfigError: the schema registry does not answer, or refuses us.
    """
    index = window.fold(records, start)
    while window.schema_needed is not None:
        decoder.load(window.schema_needed)
        index = window.fold(records, index)
    return index
