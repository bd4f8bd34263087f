"""A Kafka node with TLS and SASL listeners, and the files and users to reach them with."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trustme
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from cryptography.hazmat.primitives import serialization

from pipeline.local import PackagedKafka

USER = "reporter"
PASSWORD = "-".join(("correct", "horse"))
CLIENT_SECRET = "-".join(("battery", "staple"))
LISTENERS = {"MTLS": "SSL", "SASL_TLS": "SASL_SSL", "EXPIRED": "SASL_SSL", "SASL": "SASL_PLAINTEXT"}
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER")
_LOGIN = {
    "PLAIN": f'plain.PlainLoginModule required username="broker" password="b" user_{USER}="{PASSWORD}"',
    "SCRAM-SHA-256": "scram.ScramLoginModule required",
    "SCRAM-SHA-512": "scram.ScramLoginModule required",
    "OAUTHBEARER": 'oauthbearer.OAuthBearerLoginModule required unsecuredLoginStringClaim_sub="broker"',
}
_AUTHORIZER = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "super.users": "User:ANONYMOUS",
}


@dataclass
class SecuredKafka:
    """`files` are those of `pem_files`."""

    node: PackagedKafka
    files: dict[str, Path]


@dataclass
class TokenServer:
    """An OAuth token endpoint; it issues unsecured JWTs, which Kafka accepts by default."""

    url: str
    requests: list[dict[str, Any]] = field(default_factory=list)


def pem_files(folder: Path) -> dict[str, Path]:
    """Make two CAs, and with the first: a server's certificate, an expired one, a client's, and their keys."""
    ca, other_ca = trustme.CA(), trustme.CA()
    yesterday = datetime.now(UTC) - timedelta(days=1)
    names = ("localhost", "127.0.0.1")
    client = ca.issue_cert(f"{USER}@example.org")
    contents = {
        "ca": [ca.cert_pem.bytes()],
        "other_ca": [other_ca.cert_pem.bytes()],
        "server": _pkcs8(ca.issue_cert(*names)),
        "expired": _pkcs8(ca.issue_cert(*names, not_before=yesterday - timedelta(days=1), not_after=yesterday)),
        "client": _pkcs8(client),
        "encrypted_key": _pkcs8(client, password=PASSWORD.encode())[:1],
    }
    files = {name: folder / f"{name}.pem" for name in contents}
    for name, blobs in contents.items():
        files[name].write_bytes(b"".join(blobs))
    return files


def _pkcs8(certificate: trustme.LeafCert, password: bytes | None = None) -> list[bytes]:
    """Return the key in the only format that Kafka reads, and the certificate chain."""
    key = serialization.load_pem_private_key(certificate.private_key_pem.bytes(), None)
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    return [text, *(blob.bytes() for blob in certificate.cert_chain_pems)]


@contextmanager
def secured_kafka(jars: Sequence[Path], folder: Path, *, has_acls: bool = False) -> Iterator[SecuredKafka]:
    """Run Kafka; `has_acls`: what no ACL allows is refused, except on the node's own listener."""
    files = pem_files(folder)
    settings = dict(_AUTHORIZER) if has_acls else {}
    for listener, protocol in LISTENERS.items():
        prefix = f"listener.name.{listener.lower()}."
        if protocol.endswith("SSL"):
            keystore = files["expired" if listener == "EXPIRED" else "server"]
            settings |= {
                f"{prefix}ssl.keystore.type": "PEM",
                f"{prefix}ssl.keystore.location": str(keystore),
                f"{prefix}ssl.truststore.type": "PEM",
                f"{prefix}ssl.truststore.location": str(files["ca"]),
                f"{prefix}ssl.client.auth": "required" if listener == "MTLS" else "none",
            }
        if protocol.startswith("SASL"):
            settings[f"{prefix}sasl.enabled.mechanisms"] = ",".join(MECHANISMS)
            for mechanism, login in _LOGIN.items():
                jaas = f"org.apache.kafka.common.security.{login};"
                settings[f"{prefix}{mechanism.lower()}.sasl.jaas.config"] = jaas
    with PackagedKafka(jars, settings=settings, listeners=LISTENERS) as node:
        _create_users(node.bootstrap_servers)
        yield SecuredKafka(node, files)


def _create_users(bootstrap_servers: str) -> None:
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    for mechanism in (ScramMechanism.SCRAM_SHA_256, ScramMechanism.SCRAM_SHA_512):  # Kafka takes one per request
        change = UserScramCredentialUpsertion(USER, ScramCredentialInfo(mechanism, 4096), PASSWORD.encode())
        admin.alter_user_scram_credentials([change])[USER].result(30)


@contextmanager
def token_server(*, life_seconds: float = 300) -> Iterator[TokenServer]:
    """Serve tokens to clients with CLIENT_SECRET, and 401 to others."""
    served: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            form = self.rfile.read(int(self.headers["Content-Length"])).decode()
            client = base64.b64decode(self.headers["Authorization"].removeprefix("Basic ")).decode()
            served.append({"form": form, "client": client})
            is_known = client == f"{USER}:{CLIENT_SECRET}"
            body = json.dumps(_token(life_seconds) if is_known else {"error": "invalid_client"}).encode()
            self.send_response(200 if is_known else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield TokenServer(f"http://127.0.0.1:{server.server_port}/token", served)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _token(life_seconds: float) -> dict[str, Any]:
    now = time.time()
    claims = {"sub": USER, "iat": now, "exp": now + life_seconds}
    parts = [json.dumps(part).encode() for part in ({"alg": "none"}, claims)]
    header, payload = (base64.urlsafe_b64encode(part).decode().rstrip("=") for part in parts)
    return {"access_token": f"{header}.{payload}.", "token_type": "bearer", "expires_in": life_seconds}
