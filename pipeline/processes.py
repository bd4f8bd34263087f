"""Child processes that never outlive their parent."""

from __future__ import annotations

import ctypes
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1  # from <sys/prctl.h>

# Loaded in the parent: between fork and exec a child must not import or allocate.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent dies, by kill -9 too; for `preexec_fn`.

    Without effect elsewhere than on Linux.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
