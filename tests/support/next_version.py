"""The commands as of a later version, which makes and reads batches of version 2: `-m` this instead of pipeline.

What the versions differ in does not matter here: version 2 has the fields of version 1.
"""

from __future__ import annotations

from typing import Any

import msgspec

from pipeline.cli import main
from pipeline.core import batch

NEXT_VERSION = 2
MODULE = ("tests.support.next_version",)

_encode = batch._encode


def _encode_as_next(value: Any) -> bytes:
    is_batch = isinstance(value, batch.Batch)
    return _encode(msgspec.structs.replace(value, version=NEXT_VERSION) if is_batch else value)


if __name__ == "__main__":
    batch.BATCH_VERSION = NEXT_VERSION
    batch._encode = _encode_as_next
    main()
