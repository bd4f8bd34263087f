"""Child processes on 127.0.0.1: started with a log, awaited until ready, ended with this process."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.errors import ServiceUnavailable

LOOPBACK = "127.0.0.1"

_LAUNCHER = Path(__file__).with_name("end_with_parent.py")
_POLL_SECONDS = 0.03

# The kernel ends a child when the THREAD that started it ends, so one thread that lives as long as this
# process starts them all: a broker restarted from a worker thread must outlive that thread.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="child-starter")


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on.

    Source: below the ephemeral ranges of Linux (32768) and macOS (49152). A port from those could be taken by
    any outgoing connection while its server restarts, even by a client that reconnects to itself.
    """
    for _ in range(200):
        port = 15_000 + secrets.randbelow(32_768 - 15_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise ServiceUnavailable("no free TCP port between 15000 and 32767 on 127.0.0.1: end what listens there")


def accepts_connections(port: int) -> bool:
    """Tell whether something listens on the port of 127.0.0.1."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1):
            return True
    except OSError:
        return False


class ChildProcess:
    """A running command in a session of its own, so that the terminal's Ctrl-C reaches this process first.

    Guarantee: on Linux it ends when this process ends, kill -9 included; elsewhere only when it is stopped.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        log_path: Path,
        user: str = "",
        death_signal: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self._process = _starter.submit(self._spawn, list(map(str, command)), user, death_signal).result()

    def _spawn(self, command: list[str], user: str, death_signal: signal.Signals) -> subprocess.Popen[bytes]:
        launch = [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), str(int(death_signal)), user]
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                launch + command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.log_path.parent,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Process id of the command itself; there is no shell or wrapper between."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has not ended yet."""
        return self._process.poll() is None

    def wait_ready(self, is_ready: Callable[[], bool], timeout_seconds: float) -> None:
        """Return once `is_ready` says so.

        Raises:
            ServiceUnavailable: the process ended first, or the time is over; it is dead then.
        """
        deadline = time.monotonic() + timeout_seconds
        while not is_ready():
            code = self._process.poll()
            if code is not None:
                raise ServiceUnavailable(f"{self.name} ended at start with code {code}: {self.last_words()}")
            if time.monotonic() > deadline:
                self.kill()
                message = f"{self.name} was not ready within {timeout_seconds:.0f} s: {self.last_words()}"
                raise ServiceUnavailable(message)
            time.sleep(_POLL_SECONDS)

    def wait(self, timeout_seconds: float) -> None:
        """Return when the process has ended by itself.

        Raises:
            ServiceUnavailable: it ended with a code other than 0, or the time is over; it is dead then.
        """
        try:
            code = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            message = f"{self.name} did not end within {timeout_seconds:.0f} s: {self.last_words()}"
            raise ServiceUnavailable(message) from None
        if code != 0:
            raise ServiceUnavailable(f"{self.name} failed with code {code}: {self.last_words()}")

    def stop(self, by: signal.Signals, timeout_seconds: float) -> None:
        """Send a signal and wait for the end; kill what has not ended in time."""
        if self.is_running:
            self._process.send_signal(by)
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Send SIGKILL and wait for the end."""
        if self.is_running:
            self._process.kill()
        self._process.wait()

    def last_words(self) -> str:
        """Return the end of the log in one line, without the frames of a stack trace."""
        lines = [line.strip() for line in self.log_path.read_text("utf-8", "replace").splitlines()]
        told = [line for line in lines if line and not line.startswith(("at ", "... "))]
        return " | ".join(told[-3:]) or "it logged nothing"
