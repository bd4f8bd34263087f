"""Schemas by their ids: loaded from the registry once, then read with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Final, NamedTuple

import msgspec

from pipeline.core.decoding import SchemaId, SchemaNeeded
from pipeline.core.report import PARSE_ERRORS, Report, parse_report, parse_well_formed
from pipeline.errors import DecodeError
from pipeline.formats.registry import RegisteredSchema, SchemaRegistry, UnknownSchema

# How long an id that the registry doesn't know, or whose schema can't be read, is not asked for again. Serializers
# register a schema before they use it, so an unknown id is forged or of another registry; but a registry's follower may
# lag behind, and what can't be read today may be once a reference is registered.
UNKNOWN_SECONDS: Final = 60.0
# How many unknown ids are asked for at once; after that, one a second. All partitions wait for each such request.
UNKNOWN_AT_ONCE: Final = 10
# A record may carry any id, so what is remembered of them is bounded; at the limit all is forgotten, and asked anew.
MAX_SCHEMAS: Final = 1_000
MAX_REFUSED: Final = 10_000

_parse_json: Final = msgspec.json.Decoder().decode


class _Readers(NamedTuple):
    read: Callable[[bytes], object]
    read_report: Callable[[bytes], Report] | None


class _Refusal(NamedTuple):
    reason: str
    until: float


class Schemas:
    """Readers of records by the id of their schema; usable from several threads.

    Guarantee: only load() asks the registry, once for an id; an id that is refused, again after UNKNOWN_SECONDS. No
    ids, however many, fill the memory, or keep the registry busy.
    """

    def __init__(self, registry: SchemaRegistry, *, now: Callable[[], float] = time.monotonic) -> None:
        self._registry = registry
        self._now = now
        self._readers: dict[SchemaId, _Readers] = {}
        self._refused: dict[SchemaId, _Refusal] = {}
        # Each unknown id that was asked for puts this off by a second from now; see UNKNOWN_AT_ONCE.
        self._unknown_until = 0.0
        self._loading = threading.Lock()

    def reader(self, schema_id: SchemaId) -> Callable[[bytes], object]:
        """Return what reads a payload as plain values; it raises DecodeError for bytes that are not of its schema.

        Raises:
            SchemaNeeded: load() it first.
            DecodeError: it is unknown or can't be read; the reason for the dead letter.
        """
        return self._find(schema_id).read

    def report_reader(self, schema_id: SchemaId) -> Callable[[bytes], Report] | None:
        """Return what reads a payload directly as a report, or None where the schema's fields are not our own.

        Like a report in our own JSON, what it reads is within the limits if the payload is at most SHORT_BYTES and has
        no BACKSLASH; apply_limits() does the rest. It raises DecodeError for whatever else there is, which `reader` may
        well read: JSON whose values are no text, and in Protobuf another message than the schema's first.

        Raises:
            SchemaNeeded, DecodeError: as `reader`.
        """
        return self._find(schema_id).read_report

    def load(self, schema_id: SchemaId) -> None:
        """Ask the registry for a schema, unless it is known; then reader() answers. Blocks.

        Raises:
            ServiceUnavailable: the registry is away, or this machine can't compile a schema now: hold, and load again.
            ConfigError: the registry refuses this client, or is not there.
        """
        with self._loading:
            try:
                self._find(schema_id)
                return
            except DecodeError:
                return
            except SchemaNeeded:
                pass
            try:
                readers = _readers(self._registry.fetch(schema_id))
            except UnknownSchema as error:
                self._refuse(schema_id, str(error))
                self._unknown_until = max(self._unknown_until, self._now()) + 1
            except DecodeError as error:
                self._refuse(schema_id, f"schema {schema_id}: {error}")
            else:
                if len(self._readers) >= MAX_SCHEMAS:
                    self._readers = {}
                self._readers[schema_id] = readers

    def _find(self, schema_id: SchemaId) -> _Readers:
        readers = self._readers.get(schema_id)
        if readers is not None:
            return readers
        refusal = self._refused.get(schema_id)
        now = self._now()
        if refusal is not None and now < refusal.until:
            raise DecodeError(refusal.reason)
        if self._unknown_until - now > UNKNOWN_AT_ONCE - 1:
            raise DecodeError(
                f"the schema registry was not asked for schema {schema_id}: it was just asked for {UNKNOWN_AT_ONCE} "
                "that it doesn't have, and is asked for one a second now; if it has this one, redrive it, or replay"
            )
        raise SchemaNeeded(schema_id)

    def _refuse(self, schema_id: SchemaId, reason: str) -> None:
        if len(self._refused) >= MAX_REFUSED:
            self._refused = {}
        self._refused[schema_id] = _Refusal(reason, self._now() + UNKNOWN_SECONDS)


def read_json(payload: bytes) -> object:
    """Read any JSON; lone surrogates become U+FFFD.

    Raises:
        DecodeError: it is not JSON.
    """
    try:
        return _parse_json(payload)
    except PARSE_ERRORS as error:
        return parse_well_formed(_parse_json, payload, error, "not JSON")


def _read_json_report(payload: bytes) -> Report:
    try:
        return parse_report(payload)
    except PARSE_ERRORS as error:
        raise DecodeError(f"not a report: {error}") from error


def _readers(schema: RegisteredSchema) -> _Readers:
    """Make the readers of a schema. JSON is not validated: a report is one by its fields, whatever a schema demands.

    Raises:
        DecodeError: this schema can't be read.
    """
    # Imported here: their libraries, of the extra [formats], are needed only where there is a registry.
    if schema.kind == "JSON":
        return _Readers(read_json, _read_json_report)
    if schema.kind == "AVRO":
        from pipeline.formats.avro import AvroSchema
        from pipeline.formats.reports import read_avro_report

        avro = AvroSchema(schema.text, list(schema.references.values()))
        return _Readers(avro.read, read_avro_report if avro.is_report else None)
    from pipeline.formats.protobuf import ProtobufSchema

    protobuf: Any = ProtobufSchema(schema.text, schema.references)
    return _Readers(protobuf.read, protobuf.read_report if protobuf.is_report else None)
