"""NOTIFY payloads: agent ids, byte for byte as coder's own listeners read them."""

from __future__ import annotations

import base64
import binascii
import uuid
from collections.abc import Iterable, Sequence
from typing import Final

from pipeline.errors import DecodeError

# Source: coder's metadatabatcher; one channel for all agents.
NOTIFY_CHANNEL: Final = "workspace_agent_metadata_batch"
# 16 bytes in standard base64 without padding.
ENCODED_ID_CHARS: Final = 22
# Postgres accepts 7,999 bytes and refuses 8,000; metadatabatcher assumes 8,000, which also makes 363 ids.
MAX_PAYLOAD_BYTES: Final = 7999
MAX_IDS_PER_PAYLOAD: Final = MAX_PAYLOAD_BYTES // ENCODED_ID_CHARS


def encode_agent_id(agent_id: uuid.UUID, buffer: bytearray | memoryview | None = None) -> str:
    """Encode an id as 22 characters of standard base64 without padding, also into the start of `buffer` if given.

    Not the URL-safe alphabet: listeners compare the text, and would silently miss ids with + or /.

    Raises:
        ValueError: the buffer has fewer than 22 bytes; it is unchanged.
    """
    encoded = base64.b64encode(agent_id.bytes)[:ENCODED_ID_CHARS]
    if buffer is not None:
        if len(buffer) < ENCODED_ID_CHARS:
            raise ValueError(f"a buffer of {len(buffer)} bytes is too small: an agent id takes {ENCODED_ID_CHARS}")
        buffer[:ENCODED_ID_CHARS] = encoded
    return encoded.decode("ascii")


def encode_agent_id_chunks(agent_ids: Iterable[uuid.UUID]) -> list[str]:
    """Encode ids, in order, into payloads of at most 363 ids; no ids give no payload."""
    encoded = [encode_agent_id(agent_id) for agent_id in agent_ids]
    return [
        "".join(encoded[start : start + MAX_IDS_PER_PAYLOAD]) for start in range(0, len(encoded), MAX_IDS_PER_PAYLOAD)
    ]


def decode_agent_ids(payload: str) -> Sequence[uuid.UUID]:
    """Decode a payload into its ids, in order; an empty payload has none.

    Raises:
        DecodeError: the length is not a multiple of 22, or a part is not base64.
    """
    if len(payload) % ENCODED_ID_CHARS:
        raise DecodeError(f"a payload of {len(payload)} characters is not a multiple of {ENCODED_ID_CHARS}")
    parts = (payload[i : i + ENCODED_ID_CHARS] for i in range(0, len(payload), ENCODED_ID_CHARS))
    try:
        return [uuid.UUID(bytes=base64.b64decode(part + "==", validate=True)) for part in parts]
    except (binascii.Error, ValueError) as error:
        raise DecodeError(f"a part of the payload is not an agent id: {error}") from error
