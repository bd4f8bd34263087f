"""Postgres with TLS and PgBouncer, as Debian packages them: no wheel has either."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn
from urllib.parse import unquote, urlsplit

from pipeline.local.process import LOOPBACK, ChildProcess, accepts_connections, free_port
from tests.conftest import unavailable

_START_SECONDS = 60.0
# Both refuse to run as root.
_USER = "nobody" if os.geteuid() == 0 else ""


def _missing(package: str) -> NoReturn:
    unavailable(f"Debian's package {package} is not installed", required_by="PIPELINE_REQUIRE_DEBIAN")


def _own(*paths: Path) -> None:
    if _USER:
        entry = pwd.getpwnam(_USER)
        for path in paths:
            os.chown(path, entry.pw_uid, entry.pw_gid)


@contextmanager
def postgres_with_tls(folder: Path, server_pem: Path) -> Iterator[str]:
    """Start a server with a certificate; yield the URL of its database, without sslmode."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    if not found:
        _missing("postgresql")
    binaries, port, log = found[-1].parent, free_port(), folder / "postgres.log"
    data, password, certificate = folder / "data", folder / "password", folder / "server.pem"
    password.write_text("hidden")
    shutil.copy(server_pem, certificate)
    certificate.chmod(0o600)
    _own(folder, password, certificate)
    init = [binaries / "initdb", "-D", data, "-U", "postgres", "--no-sync", "--auth=scram-sha-256", "--locale=C"]
    ChildProcess("initdb", [*init, f"--pwfile={password}"], log_path=log, user=_USER).wait(_START_SECONDS)
    settings = {
        "listen_addresses": LOOPBACK,
        "port": str(port),
        "unix_socket_directories": "",
        "fsync": "off",
        "ssl": "on",
        "ssl_cert_file": str(certificate),
        "ssl_key_file": str(certificate),
    }
    options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    server = ChildProcess(
        "PostgreSQL",
        [binaries / "postgres", "-D", data, *options],
        log_path=log,
        user=_USER,
        death_signal=signal.SIGQUIT,
    )
    try:
        server.wait_ready(lambda: _is_ready(binaries, port), _START_SECONDS)
        yield f"postgresql://postgres:hidden@{LOOPBACK}:{port}/postgres"
    finally:
        server.stop(signal.SIGQUIT, 20)


def _is_ready(binaries: Path, port: int) -> bool:
    command = [binaries / "pg_isready", "--quiet", f"--host={LOOPBACK}", f"--port={port}"]
    return subprocess.run(command, check=False).returncode == 0


@contextmanager
def pgbouncer(folder: Path, database_url: str, **settings: str) -> Iterator[str]:
    """Put a PgBouncer in front of a database, with its defaults except for `settings`; yield the URL through it."""
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        _missing("pgbouncer")
    url, port, config = urlsplit(database_url), free_port(), folder / "pgbouncer.ini"
    server = f"host={url.hostname} port={url.port} user={url.username} password={unquote(url.password or '')}"
    lines = {"listen_addr": LOOPBACK, "listen_port": port, "auth_type": "any", "unix_socket_dir": "", **settings}
    text = "".join(f"{name} = {value}\n" for name, value in lines.items())
    config.write_text(f"[databases]\n* = {server}\n[pgbouncer]\n{text}")
    _own(folder, config)
    process = ChildProcess("PgBouncer", [program, config], log_path=folder / "pgbouncer.log", user=_USER)
    try:
        process.wait_ready(lambda: accepts_connections(port), _START_SECONDS)
        yield url._replace(netloc=f"{url.username}@{LOOPBACK}:{port}").geturl()
    finally:
        process.stop(signal.SIGTERM, 20)
