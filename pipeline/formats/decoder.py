"""The decoder of the events topic that the settings ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pipeline.core.decoding import RecordDecoder


def decoders(_settings: Any) -> Callable[[], RecordDecoder]:
    """Return what makes a decoder; those made by it share the schemas, and each is for one partition."""
    return RecordDecoder
