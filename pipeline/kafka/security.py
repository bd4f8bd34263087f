"""Settings for reaching Kafka: brokers, TLS and SASL; their checks, and what clients are configured with."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Mapping
from typing import Any, Final, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipeline.checks import refuse_wrong_url, secret_text
from pipeline.kafka.tls import CA_FILE, CERTIFICATE_FILE, KEY_FILE, KEY_PASSWORD, tls_context

PREFIX: Final = "AGENT_METADATA_"
_PROTOCOL: Final = "AGENT_METADATA_KAFKA_SECURITY_PROTOCOL"
_MECHANISM: Final = "AGENT_METADATA_KAFKA_SASL_MECHANISM"
_TOKEN_URL: Final = "AGENT_METADATA_KAFKA_SASL_OAUTH_TOKEN_URL"  # noqa: S105  # the setting's name
_CLIENT_ID: Final = "AGENT_METADATA_KAFKA_SASL_OAUTH_CLIENT_ID"
_CLIENT_SECRET: Final = "AGENT_METADATA_KAFKA_SASL_OAUTH_CLIENT_SECRET"  # noqa: S105  # the setting's name

# Values of settings, by environment variable.
_Values = Mapping[str, str | SecretStr | None]


class KafkaSecurity(BaseSettings):
    """Where Kafka is, and how clients and brokers authenticate each other; one set of settings for all clients.

    Combinations that can't work, and files that can't be used, are refused when an instance is made.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, populate_by_name=True, extra="forbid")

    kafka_bootstrap_servers: str = Field(
        default="localhost:9092",
        validation_alias="KAFKA_BOOTSTRAP_SERVERS",
        description="host:port of one or more brokers, comma separated",
    )
    kafka_security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT", description="how clients talk to Kafka, by Kafka's own names"
    )
    kafka_ssl_cafile: str | None = Field(
        default=None, description="PEM file of the CAs that are trusted, also for the token URL; unset: the system's"
    )
    kafka_ssl_certfile: str | None = Field(default=None, description="PEM file of this client's certificate, for mTLS")
    kafka_ssl_keyfile: str | None = Field(default=None, description="PEM file of its key")
    kafka_ssl_key_password: SecretStr | None = Field(default=None, description="password of an encrypted key")
    kafka_sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = Field(
        default=None, description="for SASL_SSL and SASL_PLAINTEXT"
    )
    kafka_sasl_username: str | None = Field(default=None, description="for PLAIN and SCRAM")
    kafka_sasl_password: SecretStr | None = Field(default=None, description="for PLAIN and SCRAM")
    kafka_sasl_oauth_token_url: str | None = Field(
        default=None, description="where OAUTHBEARER's tokens come from, by OAuth's client credentials"
    )
    kafka_sasl_oauth_client_id: str | None = Field(default=None, description="for OAUTHBEARER")
    kafka_sasl_oauth_client_secret: SecretStr | None = Field(default=None, description="for OAUTHBEARER")
    kafka_sasl_oauth_scope: str | None = Field(default=None, description="for OAUTHBEARER, if the token URL wants one")

    @field_validator("kafka_bootstrap_servers")
    @classmethod
    def _is_server_list(cls, value: str) -> str:
        for server in value.split(","):
            host, _, port = server.strip().rpartition(":")
            if not host or not port.isdecimal() or not 0 < int(port) < 65_536:
                raise ValueError(f"{server.strip()!r} is not host:port")
        return value

    @model_validator(mode="after")
    def _security_fits(self) -> Self:
        self._check_sasl()
        self._check_files()
        if self.kafka_sasl_mechanism == "OAUTHBEARER":
            refuse_wrong_url(
                self.kafka_sasl_oauth_token_url or "", _TOKEN_URL, login=f"{_CLIENT_ID} and {_CLIENT_SECRET}"
            )
        self.tls_context()
        return self

    def _check_sasl(self) -> None:
        protocol, mechanism = self.kafka_security_protocol, self.kafka_sasl_mechanism
        password: _Values = {
            "AGENT_METADATA_KAFKA_SASL_USERNAME": self.kafka_sasl_username,
            "AGENT_METADATA_KAFKA_SASL_PASSWORD": self.kafka_sasl_password,
        }
        oauth: _Values = {
            _TOKEN_URL: self.kafka_sasl_oauth_token_url,
            _CLIENT_ID: self.kafka_sasl_oauth_client_id,
            _CLIENT_SECRET: self.kafka_sasl_oauth_client_secret,
        }
        scope: _Values = {"AGENT_METADATA_KAFKA_SASL_OAUTH_SCOPE": self.kafka_sasl_oauth_scope}
        if not protocol.startswith("SASL"):
            _refuse_useless(
                {_MECHANISM: mechanism, **password, **oauth, **scope},
                f"with {_PROTOCOL}={protocol}: set that to SASL_SSL or SASL_PLAINTEXT, or",
            )
            return
        if mechanism is None:
            raise ValueError(
                f"{_MECHANISM} is missing with {_PROTOCOL}={protocol}: "
                "set it to PLAIN, SCRAM-SHA-256, SCRAM-SHA-512 or OAUTHBEARER"
            )
        required, useless = (oauth, password) if mechanism == "OAUTHBEARER" else (password, {**oauth, **scope})
        for variable, value in required.items():
            if not value:
                raise ValueError(f"{variable} is missing with {_MECHANISM}={mechanism}: set it")
        _refuse_useless(useless, f"with {_MECHANISM}={mechanism}:")

    def _check_files(self) -> None:
        protocol = self.kafka_security_protocol
        ca_file: _Values = {CA_FILE: self.kafka_ssl_cafile}
        pair: _Values = {CERTIFICATE_FILE: self.kafka_ssl_certfile, KEY_FILE: self.kafka_ssl_keyfile}
        key_password: _Values = {KEY_PASSWORD: self.kafka_ssl_key_password}
        if not protocol.endswith("SSL"):
            # OAUTHBEARER's token URL has TLS of its own, checked with the same CAs.
            useless = pair if self.kafka_sasl_mechanism == "OAUTHBEARER" else {**ca_file, **pair}
            _refuse_useless(
                {**useless, **key_password}, f"with {_PROTOCOL}={protocol}: set that to SSL or SASL_SSL, or"
            )
        if bool(self.kafka_ssl_certfile) != bool(self.kafka_ssl_keyfile):
            given, missing = (CERTIFICATE_FILE, KEY_FILE) if self.kafka_ssl_certfile else (KEY_FILE, CERTIFICATE_FILE)
            raise ValueError(f"{missing} is missing with {given}: set both; one file may hold both")
        if not self.kafka_ssl_keyfile:
            _refuse_useless(key_password, f"without {KEY_FILE}:")

    def tls_context(self) -> ssl.SSLContext:
        """Make the context for Python's TLS, to Kafka and to the token URL; see tls.tls_context."""
        return tls_context(
            self.kafka_ssl_cafile,
            self.kafka_ssl_certfile,
            self.kafka_ssl_keyfile,
            secret_text(self.kafka_ssl_key_password),
        )

    def client_config(self) -> dict[str, Any]:
        """Return librdkafka's configuration that every confluent-kafka client of ours needs to reach the cluster."""
        return {
            "bootstrap.servers": self.kafka_bootstrap_servers,
            **self._librdkafka_security(),
            "client.id": "agent-metadata",
            "topic.metadata.refresh.interval.ms": 30_000,
            "log.connection.close": False,
            "logger": logging.getLogger("librdkafka"),  # otherwise it writes to stderr in its own format
        }

    def _librdkafka_security(self) -> dict[str, str]:
        config = {
            "security.protocol": self.kafka_security_protocol,
            "ssl.ca.location": self.kafka_ssl_cafile,
            "ssl.certificate.location": self.kafka_ssl_certfile,
            "ssl.key.location": self.kafka_ssl_keyfile,
            "ssl.key.password": secret_text(self.kafka_ssl_key_password),
            "sasl.mechanism": self.kafka_sasl_mechanism,
            "sasl.username": self.kafka_sasl_username,
            "sasl.password": secret_text(self.kafka_sasl_password),
        }
        if self.kafka_sasl_mechanism == "OAUTHBEARER":  # librdkafka has a client for OAuth tokens built in
            config |= {
                "sasl.oauthbearer.method": "oidc",
                "sasl.oauthbearer.token.endpoint.url": self.kafka_sasl_oauth_token_url,
                "sasl.oauthbearer.client.id": self.kafka_sasl_oauth_client_id,
                "sasl.oauthbearer.client.secret": secret_text(self.kafka_sasl_oauth_client_secret),
                "sasl.oauthbearer.scope": self.kafka_sasl_oauth_scope,
                "https.ca.location": self.kafka_ssl_cafile,
            }
        return {name: value for name, value in config.items() if value}


def _refuse_useless(values: _Values, where: str) -> None:
    for variable, value in values.items():
        if value:
            may_be_secret = isinstance(value, SecretStr) or variable == _TOKEN_URL  # a URL may hold a password
            shown = "" if may_be_secret else f"={value}"
            raise ValueError(f"{variable}{shown} has no use {where} unset it")
