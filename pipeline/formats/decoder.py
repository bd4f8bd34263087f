"""The decoder of the events topic that the settings ask for: frames, schemas and a mapping, composed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, NoReturn

from pipeline.core.decoding import NOT_PLAIN, Decoded, RecordDecoder, SchemaId
from pipeline.core.record import Record
from pipeline.core.report import Report, apply_limits, convert_report, parse_any_report
from pipeline.errors import DecodeError
from pipeline.formats.framing import has_schema_header, split_frame
from pipeline.formats.mapping import CompiledMapping
from pipeline.formats.otlp import OtlpReader
from pipeline.formats.registry import SchemaRegistry
from pipeline.formats.schemas import Schemas, read_json
from pipeline.formats.settings import FormatSettings

# In front of a payload: the magic byte and a schema's number.
_PREFIX_BYTES: Final = 5
_MAGIC: Final = (b"\0", b"\1")


def decoders(settings: FormatSettings) -> Callable[[], RecordDecoder]:
    """Return what makes a decoder; those made by it share the schemas, and each is for one partition.

    Raises:
        ConfigError: the extra [formats] is not installed, and the settings need it.
    """
    if settings.events_format != "json":
        return partial(_OtlpDecoder, OtlpReader(settings.events_format, settings.otlp))
    config = settings.registry_config()
    schemas = Schemas(SchemaRegistry(config)) if config else None
    return partial(EventsDecoder, schemas, CompiledMapping(settings.mapping) if settings.mapping else None)


class EventsDecoder(RecordDecoder):
    """Decodes JSON, ours or by a mapping, and whatever has a schema's id in front of it or in a header.

    Framed records are recognised one by one, so a topic may change its format while it is used.
    """

    def __init__(self, schemas: Schemas | None, mapping: CompiledMapping | None) -> None:
        super().__init__()
        self._schemas = schemas
        self._mapping = mapping
        # By the bytes in front of it: the fast way for a schema. No record whose schema is in a header is taken for one
        # of these: none of our own formats begins like a frame with a number that a registry has given.
        self._readers: dict[bytes, Callable[[bytes], Report]] = {}
        self.reset()

    def reset(self) -> None:
        """Begin with unframed JSON again."""
        if self._mapping is None:
            super().reset()
        else:
            self.parse = self._mapping.parse or _nothing_is_plain

    def is_own_json(self, raw: bytes) -> bool:
        """Tell whether a value is, if anything, a report in our own JSON."""
        return self._mapping is None and raw[:1] not in _MAGIC

    def load(self, schema_id: SchemaId) -> None:
        """Fetch a schema; see RecordDecoder."""
        assert self._schemas is not None  # nothing else asks for one
        self._schemas.load(schema_id)

    def decode(self, record: Record) -> Decoded:
        """Decode a record the careful way; see RecordDecoder."""
        if record.value is not None and not (has_schema_header(record.headers) and self._is_plain_json(record.value)):
            framed = split_frame(record.value, record.headers)
            if framed is not None:
                return self._decode_framed(record, *framed)
        if self._mapping is None:
            return super().decode(record)
        return _limited(self._mapping.decode(record.value, record))

    def _is_plain_json(self, value: bytes) -> bool:
        """Tell whether a value is read as unframed JSON, whatever its headers say, as `parse` sees no headers."""
        if not value.startswith(b"{"):
            return False
        parse = parse_any_report if self._mapping is None else self._mapping.parse
        try:
            return parse is not None and bool(parse(value))
        except NOT_PLAIN:
            return False

    def _decode_framed(self, record: Record, schema_id: SchemaId, payload: bytes) -> Decoded:
        if self._schemas is None:
            return self._decode_without_registry(record, schema_id, payload)
        read = self._schemas.reader(schema_id)
        assert record.value is not None
        is_prefixed = payload == record.value[_PREFIX_BYTES:]
        if self._mapping is not None:
            if read is not read_json:
                return _limited(self._mapping.reports(read(payload), record))
            if is_prefixed and self._mapping.parse is not None:
                self._parse_prefixed(record.value, self._mapping.parse)
            return _limited(self._mapping.decode(payload, record))
        read_report = self._schemas.report_reader(schema_id)
        if read_report is None:
            return _limited([convert_report(read(payload))])
        if is_prefixed:
            self._parse_prefixed(record.value, read_report)
        try:
            return _limited([read_report(payload)])
        except DecodeError:  # not plain: values that are no text, another message of the schema
            if is_prefixed and read is read_json:
                self._parse_prefixed(record.value, parse_any_report)
            return _limited([convert_report(read(payload))])

    def _decode_without_registry(self, record: Record, schema_id: SchemaId, payload: bytes) -> Decoded:
        """Read what is JSON behind its frame: it needs no schema to be read."""
        if not payload.lstrip().startswith(b"{"):
            raise DecodeError(
                f"written in schema {schema_id} of a schema registry: set AGENT_METADATA_SCHEMA_REGISTRY_URL to read it"
            )
        if self._mapping is not None:
            return _limited(self._mapping.decode(payload, record))
        return _limited([convert_report(read_json(payload))])

    def _parse_prefixed(self, value: bytes, read: Callable[[bytes], Report]) -> None:
        """Read records that begin as this one does in the fast way from now on."""
        self._readers[value[:_PREFIX_BYTES]] = read
        readers = self._readers

        def parse(raw: bytes) -> Report:
            return readers[raw[:_PREFIX_BYTES]](raw[_PREFIX_BYTES:])

        self.parse = parse


class _OtlpDecoder(RecordDecoder):
    """Decodes metrics of OpenTelemetry, of which a record may hold those of many resources."""

    def __init__(self, reader: OtlpReader) -> None:
        super().__init__()
        self._reader = reader
        self.reset()

    def reset(self) -> None:
        """Have each record decoded with care: it holds hundreds of metrics, or at least more than one report."""
        self.parse = _nothing_is_plain

    def is_own_json(self, raw: bytes) -> bool:
        """Return false."""
        return False

    def decode(self, record: Record) -> Decoded:
        """Decode a record; see RecordDecoder."""
        return self._reader.decode(record.value)


def _limited(reports: Iterable[Report]) -> Decoded:
    """Bring reports within the limits; a problem is that of the last one that has any."""
    taken, problem = [], None
    for report in reports:
        problem = apply_limits(report) or problem
        taken.append(report)
    return Decoded(taken, problem)


def _nothing_is_plain(_value: bytes) -> NoReturn:
    raise DecodeError("not plain")
