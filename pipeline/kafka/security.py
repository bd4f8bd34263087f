"""Kafka's TLS and SASL: one set of settings for librdkafka's clients and for Faust's."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from pipeline.certificates import certificate_complaint

if TYPE_CHECKING:
    from pipeline.settings import Settings

_HANDSHAKE_SECONDS: Final = 2.0
_PREFIX: Final = "AGENT_METADATA_"
_PASSWORD: Final = ("kafka_sasl_username", "kafka_sasl_password")
_OAUTH: Final = ("kafka_sasl_oauth_token_url", "kafka_sasl_oauth_client_id", "kafka_sasl_oauth_client_secret")
_OAUTH_ALL: Final = (*_OAUTH, "kafka_sasl_oauth_scope")
_FILES: Final = ("kafka_ssl_cafile", "kafka_ssl_certfile", "kafka_ssl_keyfile")


def refuse_impossible(settings: Settings) -> None:
    """Check that the settings of Kafka's security fit together and that their files can be used.

    Raises:
        ValueError: names the setting, its value (unless secret) and what is allowed.
    """
    protocol, mechanism = settings.kafka_security_protocol, settings.kafka_sasl_mechanism
    has_ssl, has_sasl, has_oauth = "SSL" in protocol.split("_"), "SASL" in protocol, mechanism == "OAUTHBEARER"
    beside_protocol = f"beside {_PREFIX}KAFKA_SECURITY_PROTOCOL={protocol}"
    beside_mechanism = f"beside {_PREFIX}KAFKA_SASL_MECHANISM={mechanism}"
    if not has_sasl:
        for name in ("kafka_sasl_mechanism", *_PASSWORD, *_OAUTH_ALL):
            _refuse_useless(settings, name, f"{beside_protocol}: set that to SASL_SSL or SASL_PLAINTEXT, or")
    elif mechanism is None:
        raise ValueError(
            f"{_PREFIX}KAFKA_SASL_MECHANISM is missing {beside_protocol}: "
            "set it to PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER"
        )
    else:
        wanted, useless = (_OAUTH, _PASSWORD) if has_oauth else (_PASSWORD, _OAUTH_ALL)
        for name in wanted:
            if not _text(settings, name):
                raise ValueError(f"{_variable(name)} is missing {beside_mechanism}: set it")
        for name in useless:
            _refuse_useless(settings, name, f"{beside_mechanism}:")
    if not has_ssl:
        # OAUTHBEARER's token URL has TLS of its own, checked with the same CAs.
        useless_files = _FILES[1:] if has_oauth else _FILES
        for name in (*useless_files, "kafka_ssl_key_password"):
            _refuse_useless(settings, name, f"{beside_protocol}: set that to SSL or SASL_SSL, or")
    certificate, key = settings.kafka_ssl_certfile, settings.kafka_ssl_keyfile
    if bool(certificate) != bool(key):
        given, missing = _FILES[1:] if certificate else (_FILES[2], _FILES[1])
        raise ValueError(f"{_variable(missing)} is missing beside {_variable(given)}: set both; one file may hold both")
    if not key:
        _refuse_useless(settings, "kafka_ssl_key_password", f"without {_variable('kafka_ssl_keyfile')}:")
    if has_oauth:
        _refuse_wrong_url(settings.kafka_sasl_oauth_token_url or "")
    tls_context(settings)


def _refuse_useless(settings: Settings, name: str, where: str) -> None:
    if _text(settings, name):
        shown = "" if _is_secret(settings, name) else f"={_text(settings, name)}"
        raise ValueError(f"{_variable(name)}{shown} has no use {where} unset it")


def _refuse_wrong_url(url: str) -> None:
    """Refuse without showing it a URL that may hold a secret."""
    variable = _variable("kafka_sasl_oauth_token_url")
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("https", "http") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ValueError(f"{variable} must be a URL: https://host/path")
    if "@" in parts.netloc:
        raise ValueError(
            f"{variable} holds a user or a password: use {_variable('kafka_sasl_oauth_client_id')} and "
            f"{_variable('kafka_sasl_oauth_client_secret')}"
        )


def tls_context(settings: Settings) -> ssl.SSLContext:
    """Make the context for Python's TLS: server certificates and host names are checked, as librdkafka does.

    Raises:
        ValueError: a file can't be used; names its setting.
    """
    if ca_file := settings.kafka_ssl_cafile:
        _refuse_unreadable("kafka_ssl_cafile", ca_file)
    try:
        context = _server_context(ca_file)
    except ssl.SSLError:
        raise _no_pem("kafka_ssl_cafile", str(ca_file), "CA certificate") from None
    certificate, key = settings.kafka_ssl_certfile, settings.kafka_ssl_keyfile
    if certificate and key:
        _refuse_unreadable("kafka_ssl_certfile", certificate)
        _refuse_unreadable("kafka_ssl_keyfile", key)
        _load_certificate(context, certificate, key, _text(settings, "kafka_ssl_key_password"))
    return context


def _server_context(ca_file: str | None) -> ssl.SSLContext:
    # Not create_default_context: from Python 3.13 on it demands of CAs what librdkafka doesn't (VERIFY_X509_STRICT).
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if ca_file:
        context.load_verify_locations(ca_file)
    else:
        context.load_default_certs()
    return context


def _load_certificate(context: ssl.SSLContext, certificate: str, key: str, password: str) -> None:
    # OpenSSL says one thing for several causes, so each file is looked at by itself.
    for name, file, kind in (
        ("kafka_ssl_certfile", certificate, "CERTIFICATE"),
        ("kafka_ssl_keyfile", key, "PRIVATE KEY"),
    ):
        if f"{kind}-----" not in Path(file).read_text(encoding="ascii", errors="replace"):
            raise _no_pem(name, file, kind.lower())
    try:
        context.load_cert_chain(certificate, key, password)  # never None: OpenSSL would ask the terminal
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ValueError(
                f"{_variable('kafka_ssl_keyfile')}={key} is not the key of {_variable('kafka_ssl_certfile')}="
                f"{certificate}: give those of one certificate"
            ) from None
        password_variable = _variable("kafka_ssl_key_password")
        raise ValueError(
            f"{_variable('kafka_ssl_keyfile')}={key} can't be read: give its password in {password_variable}, "
            "or check the file"
        ) from None


def _refuse_unreadable(name: str, file: str) -> None:
    try:
        with Path(file).open("rb"):
            pass
    except OSError as error:
        reason = (error.strerror or type(error).__name__).lower()
        raise ValueError(f"{_variable(name)}={file}: {reason}; name a PEM file that this user may read") from None


def _no_pem(name: str, file: str, kind: str) -> ValueError:
    return ValueError(f"{_variable(name)}={file} holds no {kind}: name a PEM file")


def librdkafka_security(settings: Settings) -> dict[str, Any]:
    """Return librdkafka's configuration of it; it has a client for OAuth tokens built in."""
    config = {
        "security.protocol": settings.kafka_security_protocol,
        "ssl.ca.location": settings.kafka_ssl_cafile,
        "ssl.certificate.location": settings.kafka_ssl_certfile,
        "ssl.key.location": settings.kafka_ssl_keyfile,
        "ssl.key.password": _text(settings, "kafka_ssl_key_password"),
        "sasl.mechanism": settings.kafka_sasl_mechanism,
        "sasl.username": settings.kafka_sasl_username,
        "sasl.password": _text(settings, "kafka_sasl_password"),
    }
    if settings.kafka_sasl_mechanism == "OAUTHBEARER":
        config |= {
            "sasl.oauthbearer.method": "oidc",
            "sasl.oauthbearer.token.endpoint.url": settings.kafka_sasl_oauth_token_url,
            "sasl.oauthbearer.client.id": settings.kafka_sasl_oauth_client_id,
            "sasl.oauthbearer.client.secret": _text(settings, "kafka_sasl_oauth_client_secret"),
            "sasl.oauthbearer.scope": settings.kafka_sasl_oauth_scope,
            "https.ca.location": settings.kafka_ssl_cafile,
        }
    return {name: value for name, value in config.items() if value}


def why_certificate_refused(servers: str, ca_file: str | None) -> str | None:
    """Shake hands with the servers and say what is wrong with a certificate and what helps; None if nothing is.

    librdkafka says the same of a certificate that has expired and of one whose CA it doesn't know.
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
            return certificate_complaint(error, ca_setting=_variable("kafka_ssl_cafile"))
        except (OSError, ValueError):
            continue
    return None


def _variable(name: str) -> str:
    return _PREFIX + name.upper()


def _is_secret(settings: Settings, name: str) -> bool:
    return hasattr(getattr(settings, name), "get_secret_value")


def _text(settings: Settings, name: str) -> str:
    value: Any = getattr(settings, name)
    return str(value.get_secret_value() if _is_secret(settings, name) else value or "")
