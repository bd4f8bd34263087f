"""Values as text: what any format's values become, and what the table can hold."""

from __future__ import annotations

import math
from typing import Final

import msgspec

# Source of the limits: coder's agent API (coderd/agentapi/metadata.go), in bytes of UTF-8.
MAX_VALUE_BYTES: Final = 2048
MAX_ERROR_BYTES: Final = 2048

_REPLACEMENT: Final = "\N{REPLACEMENT CHARACTER}"
_encode: Final = msgspec.json.Encoder().encode


def as_text(value: object) -> str:
    """Return a value of any format as the text that its row gets.

    Text stays as it is, and nothing (null) is the empty text. Numbers are the shortest text that means the same number,
    booleans true and false, times RFC 3339, bytes base64, decimals their digits; objects and lists are compact JSON.

    Raises:
        TypeError, ValueError, RecursionError, msgspec.MsgspecError: JSON has no text for it. All are PARSE_ERRORS.
    """
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    text = _encode(value).decode()
    return text[1:-1] if text.startswith('"') else text  # what is quoted here needs no escapes


def limit_value(value: str, error: str) -> tuple[str, str]:
    """Return value and error within their limits, storable by Postgres.

    Guarantee: a value is cut at a character boundary, at most three bytes below the limit.
    Source: the error texts are coder's (coderd/agentapi/metadata.go); its dashboards show them.
    """
    value, error = storable(value), storable(error)
    value_bytes, error_bytes = utf8_length(value), utf8_length(error)
    if value_bytes > MAX_VALUE_BYTES:
        value = value.encode()[:MAX_VALUE_BYTES].decode(errors="ignore")
        error = f"value of {value_bytes} bytes exceeded {MAX_VALUE_BYTES} bytes"
    if error_bytes > MAX_ERROR_BYTES:
        error = f"error of {error_bytes} bytes exceeded {MAX_ERROR_BYTES} bytes"
    return value, error


def utf8_length(text: str) -> int:
    """Return how many bytes a text takes as UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def storable(text: str) -> str:
    """Return a text that Postgres can store: NUL and lone surrogates become U+FFFD."""
    if "\0" in text:
        text = text.replace("\0", _REPLACEMENT)
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return well_formed(text)
    return text


def well_formed(text: str) -> str:
    """Return a text in which pairs of surrogates are the characters they stand for, and lone ones U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
