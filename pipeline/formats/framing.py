"""Confluent's wire format: which schema a record is written in, in front of its bytes or in a header.

Source: confluent_kafka.schema_registry (`SchemaId`, `dual_schema_id_deserializer`), and Confluent's "Wire format".
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Final

from pipeline.errors import DecodeError

# Newer serializers put the id here and leave the value as it is.
VALUE_SCHEMA_ID_HEADER: Final = "__value_schema_id"
_MAGIC_ID: Final = 0
_MAGIC_GUID: Final = 1
_ID_END: Final = 5
_GUID_END: Final = 17


def has_schema_header(headers: Sequence[tuple[str, bytes]]) -> bool:
    """Tell whether a header should hold the schema's id."""
    return any(name == VALUE_SCHEMA_ID_HEADER for name, _ in headers)


def split_frame(value: bytes, headers: Sequence[tuple[str, bytes]] = ()) -> tuple[int | str, bytes] | None:
    """Return the schema's id, a number or a GUID in lower case, and the payload; None where there is no frame.

    A header counts before what the value begins with. A payload in Protobuf begins with its message indexes, even where
    these came in the header.

    Raises:
        DecodeError: a frame is cut off, or the header holds no id.
    """
    for name, content in headers:
        if name == VALUE_SCHEMA_ID_HEADER:
            framed = _split(content)
            if framed is None:
                raise DecodeError(
                    f"the header {VALUE_SCHEMA_ID_HEADER} holds no schema id: {bytes(content or b'')[:32]!r}"
                )
            schema_id, rest = framed
            return schema_id, rest + value
    return _split(value)


def frame(schema_id: int, payload: bytes) -> bytes:
    """Put a schema's id in front of a payload."""
    return b"\0" + schema_id.to_bytes(4, "big") + payload


def read_message_indexes(payload: bytes) -> tuple[tuple[int, ...], int]:
    """Return which message of a Protobuf schema the payload is, and where its bytes begin.

    Shape: the index of a top-level message, then of one nested in it, and so on.

    Raises:
        DecodeError: the indexes are cut off, or make no sense.
    """
    if payload[:1] == b"\0":  # short for (0,), and almost always what there is
        return (0,), 1
    try:
        count, position = _read_varint(payload, 0)
        if count == 0:  # short, in more bytes than it needs
            return (0,), position
        if not 0 < count <= len(payload):
            raise DecodeError(f"a Protobuf record can't have {count} message indexes")
        indexes = []
        for _ in range(count):
            index, position = _read_varint(payload, position)
            indexes.append(index)
    except IndexError:
        raise DecodeError("a Protobuf record ends within its message indexes") from None
    return tuple(indexes), position


def _split(framed: bytes) -> tuple[int | str, bytes] | None:
    if not framed or framed[0] > _MAGIC_GUID:
        return None
    end = _ID_END if framed[0] == _MAGIC_ID else _GUID_END
    if len(framed) < end:
        raise DecodeError(f"a schema id is cut off: {len(framed)} bytes of {end}")
    number = framed[1:end]
    return (int.from_bytes(number, "big") if end == _ID_END else str(uuid.UUID(bytes=number))), framed[end:]


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    """Read a zigzag-encoded number; return it and the position behind it."""
    number = shift = 0
    while True:
        byte = data[position]
        position += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return (number >> 1) ^ -(number & 1), position
        shift += 7
        if shift > 63:
            raise DecodeError("a number of more than 64 bits")
