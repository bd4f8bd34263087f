"""What concerns a role's whole process: how it stops, that it never outlives its parent, how it looks for garbage."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Final

import structlog

from pipeline.settings import SHUTDOWN_SECONDS

_PR_SET_PDEATHSIG: Final = 1  # from <sys/prctl.h>
# How much longer than SHUTDOWN_SECONDS a stop may take to let go of all connections; `run` waits a second more.
_OVERDUE_SECONDS: Final = 4.0

_log = structlog.get_logger(__name__)

# Loaded in the parent: between fork and exec a child must not import or allocate.
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its parent dies, by kill -9 too; for `preexec_fn`.

    Without effect elsewhere than on Linux.
    """
    if _libc is not None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def tune_garbage_collector() -> None:
    """Have this process look for cycles rarely; call it once, when everything is imported.

    Worker and sink make millions of objects without cycles, and each of Python's default collections would walk
    tens of thousands of pairs: measured, the worker takes 12 % more entries a second, and 38 % more where a report
    has one entry.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def on_stop_signals(stop: Callable[[], None]) -> None:
    """Have the first SIGTERM or SIGINT stop in order; the second, or time running out, ends this process as it stands.

    That is as safe as kill -9: what is not committed is read again.
    """
    signals: list[int] = []

    def end(event: str, exit_code: int) -> None:
        _log.warning(event, advice="what was under way is read again from Kafka")
        os._exit(exit_code)

    def on_signal(number: int) -> None:
        signals.append(number)
        if len(signals) > 1:
            end("ended_by_second_signal", 128 + number)
        # Kafka's clients wait longer than anybody wants where no broker answers.
        overdue = threading.Timer(SHUTDOWN_SECONDS + _OVERDUE_SECONDS, end, ("ended_as_stop_took_too_long", 1))
        overdue.daemon = True
        overdue.start()
        stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
