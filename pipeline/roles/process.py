"""Process-wide setup of a role: its stop signals, its garbage collector, and how its children end with it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import structlog

from pipeline.errors import ExitCode
from pipeline.settings import SHUTDOWN_SECONDS

# How much longer than SHUTDOWN_SECONDS a shutdown may take, to close all connections; `run` waits a second more.
_OVERDUE_SECONDS: Final = 4.0

_log = structlog.get_logger(__name__)

_LAUNCHER: Final = Path(__file__).with_name("end_with_parent.py")


def child_command(
    command: Sequence[str | Path], *, death_signal: signal.Signals = signal.SIGTERM, user: str = ""
) -> list[str]:
    """Return the command line that runs `command` as a child that does not outlive this process, even by kill -9.

    Guarantee: on Linux the kernel sends the child `death_signal` when the thread that started it ends; elsewhere it
    does not. The child keeps its process id, as no shell or wrapper stays between.

    Args:
        command: The program, by its absolute path, and its arguments.
        death_signal: What the child gets.
        user: Run as this user; empty: as the user who runs this process.
    """
    launcher = [sys.executable, "-I", "-S", str(_LAUNCHER)]
    return [*launcher, str(os.getpid()), str(int(death_signal)), user, *map(str, command)]


def tune_garbage_collector() -> None:
    """Have this process look for reference cycles rarely; call it once, when everything is imported.

    Worker and sink make millions of objects without cycles, and each of Python's default collections would walk
    tens of thousands of pairs. Measured: the worker takes 12 % more entries a second, 38 % more where a report has
    one entry.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def on_stop_signals(stop: Callable[[], None]) -> None:
    """Stop cleanly on the first SIGTERM or SIGINT; exit at once on the second, or when stopping takes too long.

    Exiting at once is as safe as kill -9: what is not committed is read again.
    """
    signals: list[int] = []

    def end(event: str, exit_code: int) -> None:
        _log.warning(event, advice="what was not committed is read again from Kafka")
        os._exit(exit_code)

    def on_signal(number: int) -> None:
        signals.append(number)
        if len(signals) > 1:
            end("ended_by_second_signal", 128 + number)
        # Kafka's clients wait far longer than this when no broker answers.
        overdue = threading.Timer(
            SHUTDOWN_SECONDS + _OVERDUE_SECONDS, end, ("ended_as_stop_took_too_long", ExitCode.FAILURE)
        )
        overdue.daemon = True
        overdue.start()
        stop()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
