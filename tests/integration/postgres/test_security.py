"""Postgres over TLS: a certificate is checked, and one that is refused ends in one line that says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.debian_services import postgres_with_tls
from tests.support.secured_kafka import pem_files

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that users other than root can reach; pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def files(folder: Path) -> dict[str, Path]:
    return pem_files(folder)


@pytest.fixture(scope="module", params=["server", "expired"])
def server(request: pytest.FixtureRequest, folder: Path, files: dict[str, Path]) -> Iterator[tuple[str, str]]:
    home = folder / request.param
    home.mkdir()
    with postgres_with_tls(home, files[request.param]) as url:
        yield request.param, url


def agent_metadata(url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments],
        env={**os.environ, "DATABASE_URL": url},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "hidden" not in line
    return line


@pytest.mark.parametrize("server", ["server"], indirect=True)
def test_certificate_of_a_known_ca_is_taken(server, files):
    url = f"{server[1]}?sslmode=verify-full&sslrootcert={files['ca']}"
    assert agent_metadata(url, "db", "migrate").stderr == ""
    assert agent_metadata(url, "db", "status").returncode == 0


@pytest.mark.parametrize("command", [("db", "status"), ("watch",)])
@pytest.mark.parametrize("server", ["server"], indirect=True)
def test_unknown_ca_is_said(server, files, command):
    done = agent_metadata(f"{server[1]}?sslmode=verify-full&sslrootcert={files['other_ca']}", *command)
    said = complaint(done)
    assert said.startswith("agent-metadata: Postgres can't be trusted: unable to get local issuer certificate; ")
    assert said.endswith("give the certificate's CA in DATABASE_URL?sslrootcert=FILE")


@pytest.mark.parametrize("server", ["server"], indirect=True)
def test_other_host_name_is_said(server, files):
    url = server[1].replace("127.0.0.1", "0.0.0.0")  # reaches the server, and is not in its certificate
    said = complaint(agent_metadata(f"{url}?sslmode=verify-full&sslrootcert={files['ca']}", "db", "status"))
    assert "use a host name that the certificate carries" in said


@pytest.mark.parametrize("server", ["expired"], indirect=True)
def test_expired_certificate_is_said(server, files):
    said = complaint(agent_metadata(f"{server[1]}?sslmode=verify-full&sslrootcert={files['ca']}", "db", "status"))
    assert said.endswith("certificate has expired; renew the server's certificate")
