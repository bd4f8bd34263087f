"""Single-precision numbers, as Avro and Protobuf have them and Python hasn't."""

from __future__ import annotations

import math
import struct
from typing import Final

_SINGLE: Final = struct.Struct("f")
# Digits that may tell a single-precision number from its neighbours, and that always do.
_DIGITS: Final = range(6, 10)


def shortest(number: float) -> float:
    """Return the number with the fewest digits that has the same single: 21.7, not 21.700000762939453."""
    if not math.isfinite(number):
        return number
    single = _SINGLE.pack(number)
    for digits in _DIGITS:
        rounded = float(f"{number:.{digits}g}")
        try:
            if _SINGLE.pack(rounded) == single:
                return rounded
        except OverflowError:  # rounded up, beyond the largest single
            continue
    return number
