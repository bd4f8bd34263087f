"""Servers as child processes on 127.0.0.1: started with a log and a folder, and ended with this process."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from pipeline.errors import ServiceUnavailable
from pipeline.roles.process import child_command

LOOPBACK = "127.0.0.1"

_POLL_SECONDS = 0.03
_STOP_SECONDS = 20.0
# Below the ephemeral ranges of Linux (32768) and macOS (49152): a port from those could be taken by any outgoing
# connection while its server restarts, even by a client that reconnects to itself.
_PORTS = range(15_000, 32_768)

_PREFIX = "agent-metadata-"
_LOCK = ".owner"

# The kernel ends a child when the THREAD that started it ends, so one thread that lives as long as this
# process starts them all: a broker restarted from a worker thread must outlive that thread.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="child-starter")


def free_port(count: int = 1) -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on: the first of `count` such ports in a row.

    Raises:
        ServiceUnavailable: none was found.
    """
    for _ in range(200):
        first = secrets.choice(_PORTS[: len(_PORTS) - count + 1])
        if _can_bind(range(first, first + count)):
            return first
    raise ServiceUnavailable(
        f"no free TCP port from {_PORTS[0]} to {_PORTS[-1]} on {LOOPBACK}: stop what listens there"
    )


def _can_bind(ports: Sequence[int]) -> bool:
    with ExitStack() as probes:
        for port in ports:
            probe = probes.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                return False
    return True


def accepts_connections(port: int) -> bool:
    """Tell whether something listens on the port of 127.0.0.1."""
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1):
            return True
    except OSError:
        return False


class ChildProcess:
    """A running command in a session of its own, so that the terminal's Ctrl-C reaches only this process.

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
        launch = child_command(command, death_signal=death_signal, user=user)
        self._process = _starter.submit(self._spawn, launch).result()

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                command,
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
        """Return once `is_ready` returns True.

        Raises:
            ServiceUnavailable: the process ended first, or was not ready in time and has been killed.
        """
        deadline = time.monotonic() + timeout_seconds
        while not is_ready():
            code = self._process.poll()
            if code is not None:
                raise ServiceUnavailable(f"{self.name} exited with code {code} while starting: {self.last_words()}")
            if time.monotonic() > deadline:
                self.kill()
                message = f"{self.name} was not ready within {timeout_seconds:.0f} s: {self.last_words()}"
                raise ServiceUnavailable(message)
            time.sleep(_POLL_SECONDS)

    def wait(self, timeout_seconds: float) -> None:
        """Return when the process has ended by itself.

        Raises:
            ServiceUnavailable: it exited with a code other than 0, or did not end in time and has been killed.
        """
        try:
            code = self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            message = f"{self.name} did not end within {timeout_seconds:.0f} s: {self.last_words()}"
            raise ServiceUnavailable(message) from None
        if code != 0:
            raise ServiceUnavailable(f"{self.name} failed with code {code}: {self.last_words()}")

    def stop(self, by: signal.Signals, timeout_seconds: float = _STOP_SECONDS) -> None:
        """Send a signal and wait for the end; kill it if it has not ended in time."""
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
        messages = [line for line in lines if line and not line.startswith(("at ", "... "))]
        return " | ".join(messages[-3:]) or "it logged nothing"


class ThrowawayFolder:
    """A folder in the system's temporary one, locked by this process as long as it is needed."""

    def __init__(self, purpose: str) -> None:
        remove_orphans()
        self.path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{purpose}-"))
        # Locked before it has the name that remove_orphans() looks for; the kernel releases the lock when this
        # process ends.
        draft = self.path / f"{_LOCK}.draft"
        self._lock = draft.open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        draft.rename(self.path / _LOCK)

    def remove(self) -> None:
        """Remove the folder and all in it; calling it again does nothing."""
        shutil.rmtree(self.path, ignore_errors=True)
        self._lock.close()


def remove_orphans() -> None:
    """Remove the folders that processes of this user left behind when they were killed."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        try:
            with (folder / _LOCK).open("r+") as lock:
                if folder.is_symlink() or os.fstat(lock.fileno()).st_uid != os.geteuid():
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # of another user, not ready, removed meanwhile, or in use
            continue


class LocalServer(ABC):
    """A server with throwaway data, which tests start, crash and restart at will.

    Guarantee: address and data outlive stop() and kill(); close() or the end of the context removes them. If this
    process dies, the server ends with it, and the next one started on this machine removes its folder.
    """

    name: ClassVar[str]
    """What messages call it."""
    start_seconds: ClassVar[float]
    """How long startup may take, recovery after a crash included."""
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM
    """What shuts it down cleanly."""

    def __init__(self, purpose: str) -> None:
        """Make its folder; `purpose` becomes part of the folder's name and names the log."""
        self._folder = ThrowawayFolder(purpose)
        self._home = self._folder.path
        self._process: ChildProcess | None = None
        self.log_path = self._home / f"{purpose}.log"

    @abstractmethod
    def _launch(self) -> ChildProcess:
        """Start the process; make its data directory first if there is none."""

    @abstractmethod
    def _is_ready(self) -> bool:
        """Tell whether the process that was launched last serves clients."""

    @property
    def pid(self) -> int:
        """Process id of the server.

        Raises:
            ServiceUnavailable: it was never started.
        """
        if self._process is None:
            raise ServiceUnavailable(f"{self.name} was not started: call start() first")
        return self._process.pid

    def start(self) -> None:
        """Return when the server serves clients; at once if it is running.

        Raises:
            ServiceUnavailable: it did not come up; the message ends with what it logged last.
        """
        if self._process is None or not self._process.is_running:
            self._process = self._launch()
            self._process.wait_ready(self._is_ready, self.start_seconds)

    def stop(self) -> None:
        """Shut down cleanly; kill it after 20 s."""
        if self._process is not None:
            self._process.stop(self.stop_signal)

    def kill(self) -> None:
        """Crash the server: SIGKILL."""
        if self._process is not None:
            self._process.kill()

    def restart(self) -> None:
        """Stop, unless stop() or kill() has been called, and start again.

        Raises:
            ServiceUnavailable: it did not come up again.
        """
        self.stop()
        self.start()

    def close(self) -> None:
        """Kill the server, since its data is thrown away, and remove its folder."""
        self.kill()
        self._folder.remove()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
