"""Kafka over TLS and SASL: the whole path works, and what is refused ends in one line that says what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tests.support.deployment import Deployment
from tests.support.secured_kafka import (
    CLIENT_SECRET,
    PASSWORD,
    USER,
    SecuredKafka,
    TokenServer,
    secured_kafka,
    token_server,
)

pytestmark = pytest.mark.services

AGENT = UUID("0b7c1e1c-3a54-4be5-9f0e-2a8f7b1ac001")
# A unique word, so that it is found wherever it is shown.
WRONG = "-".join(("wrong", "pony"))
# A quiet machine needs 3 s, most of it to start Python.
REFUSED_SECONDS = 40
COMMANDS = (("worker",), ("sink",), ("produce",), ("topics", "diff"))


@pytest.fixture(scope="module")
def kafka(kafka_jars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecuredKafka]:
    with secured_kafka(kafka_jars, tmp_path_factory.mktemp("secured")) as secured:
        yield secured


@pytest.fixture(scope="module")
def tokens() -> Iterator[TokenServer]:
    with token_server() as server:
        yield server


Way = Callable[[SecuredKafka, TokenServer], tuple[str, dict[str, str]]]


def password(mechanism: str, listener: str = "SASL_TLS") -> Way:
    def way(kafka: SecuredKafka, _: TokenServer) -> tuple[str, dict[str, str]]:
        settings = {"sasl_mechanism": mechanism, "sasl_username": USER, "sasl_password": PASSWORD}
        if listener == "SASL":
            return listener, {"security_protocol": "SASL_PLAINTEXT", **settings}
        return listener, {"security_protocol": "SASL_SSL", "ssl_cafile": str(kafka.files["ca"]), **settings}

    return way


def oauth(kafka: SecuredKafka, tokens: TokenServer) -> tuple[str, dict[str, str]]:
    return "SASL_TLS", {
        "security_protocol": "SASL_SSL",
        "ssl_cafile": str(kafka.files["ca"]),
        "sasl_mechanism": "OAUTHBEARER",
        "sasl_oauth_token_url": tokens.url,
        "sasl_oauth_client_id": USER,
        "sasl_oauth_client_secret": CLIENT_SECRET,
        "sasl_oauth_scope": "kafka",
    }


def client_certificate(kafka: SecuredKafka, _: TokenServer) -> tuple[str, dict[str, str]]:
    return "MTLS", {
        "security_protocol": "SSL",
        "ssl_cafile": str(kafka.files["ca"]),
        "ssl_certfile": str(kafka.files["client"]),
        "ssl_keyfile": str(kafka.files["encrypted_key"]),
        "ssl_key_password": PASSWORD,
    }


WAYS = {
    "SCRAM-SHA-256": password("SCRAM-SHA-256"),
    "SCRAM-SHA-512": password("SCRAM-SHA-512"),
    "PLAIN": password("PLAIN"),
    "SCRAM without TLS": password("SCRAM-SHA-512", "SASL"),
    "OAUTHBEARER": oauth,
    "client certificate": client_certificate,
}


def deployment(kafka: SecuredKafka, listener: str, settings: dict[str, str], **given: Any) -> Deployment:
    prefixed = {f"kafka_{name}": value for name, value in settings.items()}
    return Deployment(kafka.node.address(listener), **given, **prefixed)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
async def test_report_comes_through_and_no_secret_is_logged(kafka, tokens, database_url, tmp_path, way):
    listener, settings = way(kafka, tokens)
    deployed = deployment(kafka, listener, settings, database_url=database_url, folder=tmp_path)
    try:
        await deployed.prepare()
        worker, sink = await deployed.started("worker"), await deployed.started("sink")
        now = datetime.now(UTC)
        with deployed.producer() as producer:
            producer.add(AGENT, ["cpu"], ["12%"], [""], now)
        await deployed.wait_for({(str(AGENT), "cpu"): ("12%", "", now)})
        replay = deployed.start_command("replay", "--from", "1h ago", "--dry-run", "--json")
        counts = json.loads(replay.communicate(timeout=60)[0])
        assert (counts["records"], counts["already_newer"]) == (1, 1)
        assert [deployed.stop(process) for process in (worker, sink)] == [0, 0]
        logged = deployed.log(worker) + deployed.log(sink)
    finally:
        deployed.close()
    assert all(secret not in logged for secret in (PASSWORD, CLIENT_SECRET))
    assert "Traceback" not in logged


def outcome(deployed: Deployment, command: tuple[str, ...]) -> tuple[subprocess.CompletedProcess[str], float]:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *command],
        env={**os.environ, **deployed.environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done, time.monotonic() - started


CA_FILE = "AGENT_METADATA_KAFKA_SSL_CAFILE"
REFUSALS = {
    "wrong password of SCRAM": ("SCRAM-SHA-512", "SASL_TLS", {"sasl_password": WRONG}, "AGENT_METADATA_KAFKA_SASL_*"),
    "wrong password of PLAIN": ("PLAIN", "SASL_TLS", {"sasl_password": WRONG}, "AGENT_METADATA_KAFKA_SASL_*"),
    "wrong secret": ("OAUTHBEARER", "SASL_TLS", {"sasl_oauth_client_secret": WRONG}, "AGENT_METADATA_KAFKA_SASL_*"),
    "unknown CA": ("SCRAM-SHA-512", "SASL_TLS", {"ssl_cafile": "other_ca"}, f"give the certificate's CA in {CA_FILE}"),
    "expired certificate": ("SCRAM-SHA-512", "EXPIRED", {}, "certificate has expired; renew the server's certificate"),
}


@pytest.mark.parametrize(("way", "listener", "change", "advice"), REFUSALS.values(), ids=REFUSALS)
def test_refusal_is_one_line_that_says_what_to_do(kafka, tokens, database_url, tmp_path, way, listener, change, advice):
    _, settings = WAYS[way](kafka, tokens)
    settings |= {name: str(kafka.files.get(value, value)) for name, value in change.items()}
    deployed = deployment(kafka, listener, settings, database_url=database_url, folder=tmp_path)
    with ThreadPoolExecutor() as threads:
        outcomes = dict(zip(COMMANDS, threads.map(lambda command: outcome(deployed, command), COMMANDS), strict=True))
    for command, (done, seconds) in outcomes.items():
        assert (done.returncode, done.stdout) == (1, ""), command
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"agent-metadata: Kafka at {kafka.node.address(listener)} "), command
        assert advice in line
        assert all(secret not in line for secret in (PASSWORD, CLIENT_SECRET, WRONG))
        assert seconds < REFUSED_SECONDS, command
