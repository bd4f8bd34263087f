"""TLS to Kafka from Python: the context, checks of the PEM files it is made of, and why a handshake fails."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Final

from pipeline.certificates import certificate_complaint
from pipeline.checks import refuse_unreadable

CA_FILE: Final = "AGENT_METADATA_KAFKA_SSL_CAFILE"
CERTIFICATE_FILE: Final = "AGENT_METADATA_KAFKA_SSL_CERTFILE"
KEY_FILE: Final = "AGENT_METADATA_KAFKA_SSL_KEYFILE"
KEY_PASSWORD: Final = "AGENT_METADATA_KAFKA_SSL_KEY_PASSWORD"  # noqa: S105  # the setting's name
_HANDSHAKE_SECONDS: Final = 2.0


def tls_context(
    ca_file: str | None, certificate_file: str | None, key_file: str | None, key_password: str
) -> ssl.SSLContext:
    """Make a client's context that checks server certificates and host names, as librdkafka does.

    Without `ca_file` the system's CAs are trusted.

    Raises:
        ValueError: a file can't be used; names its setting.
    """
    if ca_file:
        refuse_unreadable(CA_FILE, ca_file)
    try:
        context = _server_context(ca_file)
    except ssl.SSLError:
        raise _not_pem(CA_FILE, str(ca_file), "CA certificate") from None
    if certificate_file and key_file:
        refuse_unreadable(CERTIFICATE_FILE, certificate_file)
        refuse_unreadable(KEY_FILE, key_file)
        _load_client_certificate(context, certificate_file, key_file, key_password)
    return context


def why_certificate_refused(servers: str, ca_file: str | None) -> str | None:
    """Try a handshake with each server; return what is wrong with a certificate and how to fix it, or None.

    librdkafka reports an expired certificate and one with an unknown CA in the same words.
    """
    context = _server_context(ca_file)
    for server in servers.split(","):
        host, _, port = server.strip().rpartition(":")
        host = host.strip("[]")
        try:
            with (
                socket.create_connection((host, int(port)), _HANDSHAKE_SECONDS) as connection,
                context.wrap_socket(connection, server_hostname=host),
            ):
                continue
        except ssl.SSLCertVerificationError as error:
            return certificate_complaint(error, ca_setting=CA_FILE)
        except (OSError, ValueError):
            continue
    return None


def _server_context(ca_file: str | None) -> ssl.SSLContext:
    # Not create_default_context: since Python 3.13 it demands more of CAs than librdkafka does (VERIFY_X509_STRICT).
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file:
        context.load_verify_locations(ca_file)
    else:
        context.load_default_certs()
    return context


def _load_client_certificate(context: ssl.SSLContext, certificate_file: str, key_file: str, password: str) -> None:
    # OpenSSL reports several causes in the same words, so each file is checked by itself first.
    for setting, file, kind in (
        (CERTIFICATE_FILE, certificate_file, "CERTIFICATE"),
        (KEY_FILE, key_file, "PRIVATE KEY"),
    ):
        if f"{kind}-----" not in Path(file).read_text(encoding="ascii", errors="replace"):
            raise _not_pem(setting, file, kind.lower())
    try:
        context.load_cert_chain(certificate_file, key_file, password)  # never None: OpenSSL would ask the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(
                f"{KEY_FILE}={key_file} is not the key of {CERTIFICATE_FILE}={certificate_file}: "
                "give a key and a certificate that belong together"
            ) from None
        raise ValueError(
            f"{KEY_FILE}={key_file} can't be read: give its password in {KEY_PASSWORD}, or check the file"
        ) from None


def _not_pem(setting: str, file: str, kind: str) -> ValueError:
    return ValueError(f"{setting}={file} holds no {kind}: name a PEM file")
