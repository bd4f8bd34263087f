"""Decoded values as texts, for the fast way: what is not plain is left to the careful one."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET

from pipeline.core.values import MAX_VALUE_BYTES, as_text, utf8_length
from pipeline.errors import DecodeError

_encode: Final = msgspec.json.Encoder().encode


def id_text(part: object) -> str:
    """Return a part of an id as text.

    Raises:
        DecodeError: it is not plain.
    """
    if part.__class__ is int:
        return str(part)
    if part.__class__ is not str or not part:
        raise DecodeError("an id that is not plain")
    return part


def value_text(value: Any, entry: Any) -> str:
    """Return a value that is no text as text; one that is missing is empty beside an error."""
    return "" if value is UNSET and entry.error else text_of(value)


def text_of(value: Any) -> str:
    """Return what is no text as text.

    Raises:
        DecodeError: it is missing, or its text is over the limit.
    """
    kind = value.__class__
    if kind is float or kind is int:
        return _encode(value).decode()  # as as_text() does
    text = as_text(value)
    if utf8_length(text) > MAX_VALUE_BYTES:
        raise DecodeError("a value over the limit")
    return text
