"""Settings for reaching a schema registry: its URL, passwords and TLS; their checks, and what its client takes."""

from __future__ import annotations

import ssl
from typing import Any, Final, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pipeline.checks import refuse_unreadable, refuse_wrong_url, secret_text, token_problem
from pipeline.formats.registry import CA_FILE, URL

_PREFIX: Final = "AGENT_METADATA_SCHEMA_REGISTRY_"


class RegistrySettings(BaseSettings):
    """Where the schemas of records are; without a URL, records in Confluent's wire format are dead letters.

    Combinations that can't work, and files that can't be used, are refused when an instance is made.
    """

    # As kafka/security.py has it: pydantic takes the configuration of one base class.
    model_config = SettingsConfigDict(env_prefix="AGENT_METADATA_", frozen=True, populate_by_name=True, extra="forbid")

    schema_registry_url: str | None = Field(
        default=None,
        description="https:// URL of a registry with Confluent's API, or several, comma separated; unset: none",
    )
    schema_registry_username: str | None = Field(default=None, description="for basic authentication")
    schema_registry_password: SecretStr | None = Field(default=None, description="for basic authentication")
    schema_registry_token: SecretStr | None = Field(default=None, description="bearer token, instead of a user")
    schema_registry_ssl_cafile: str | None = Field(
        default=None, description="PEM file of the CAs that are trusted; unset: certifi's"
    )
    schema_registry_ssl_certfile: str | None = Field(
        default=None, description="PEM file of this client's certificate, for mTLS"
    )
    schema_registry_ssl_keyfile: str | None = Field(default=None, description="PEM file of its key")
    schema_registry_ssl_key_password: SecretStr | None = Field(default=None, description="password of an encrypted key")
    schema_registry_auto_register: bool = Field(
        default=True,
        description="true: `produce --format` registers its schema; false: it must be registered already",
    )

    @model_validator(mode="after")
    def _registry_fits(self) -> Self:
        if not self.schema_registry_url:
            for name in RegistrySettings.model_fields:
                if name != "schema_registry_auto_register" and getattr(self, name):
                    raise ValueError(f"AGENT_METADATA_{name.upper()} has no use without {URL}: set that, or unset it")
            return self
        for url in self.schema_registry_url.split(","):
            refuse_wrong_url(url.strip(), URL, login=f"{_PREFIX}USERNAME and {_PREFIX}PASSWORD")
        self._check_registry_login()
        self._check_registry_files()
        return self

    def _check_registry_login(self) -> None:
        user, password = self.schema_registry_username, self.schema_registry_password
        if bool(user) != bool(password):
            given, missing = ("USERNAME", "PASSWORD") if user else ("PASSWORD", "USERNAME")
            raise ValueError(f"{_PREFIX}{missing} is missing with {_PREFIX}{given}: set both")
        if user and ":" in user:
            raise ValueError(f"{_PREFIX}USERNAME has a colon, which basic authentication does not allow")
        if user and self.schema_registry_token:
            raise ValueError(f"{_PREFIX}TOKEN has no use with {_PREFIX}USERNAME: unset one of them")
        if problem := token_problem(secret_text(self.schema_registry_token)):
            raise ValueError(f"{_PREFIX}TOKEN {problem}")

    def _check_registry_files(self) -> None:
        certificate, key = self.schema_registry_ssl_certfile, self.schema_registry_ssl_keyfile
        if bool(certificate) != bool(key):
            given, missing = ("SSL_CERTFILE", "SSL_KEYFILE") if certificate else ("SSL_KEYFILE", "SSL_CERTFILE")
            raise ValueError(f"{_PREFIX}{missing} is missing with {_PREFIX}{given}: set both; one file may hold both")
        if self.schema_registry_ssl_key_password and not key:
            raise ValueError(f"{_PREFIX}SSL_KEY_PASSWORD has no use without {_PREFIX}SSL_KEYFILE: unset it")
        files = {CA_FILE: self.schema_registry_ssl_cafile, f"{_PREFIX}SSL_CERTFILE": certificate}
        for setting, file in {**files, f"{_PREFIX}SSL_KEYFILE": key}.items():
            if file:
                refuse_unreadable(setting, file)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.schema_registry_ssl_cafile:
                context.load_verify_locations(self.schema_registry_ssl_cafile)
        except ssl.SSLError:
            file = self.schema_registry_ssl_cafile
            raise ValueError(f"{CA_FILE}={file} holds no CA certificate: name a PEM file") from None
        try:
            if certificate and key:  # with a password that is never None: OpenSSL would ask the terminal
                context.load_cert_chain(certificate, key, secret_text(self.schema_registry_ssl_key_password))
        except ssl.SSLError:
            raise ValueError(
                f"{_PREFIX}SSL_KEYFILE={key} is not the key of {_PREFIX}SSL_CERTFILE={certificate}, or can't be read: "
                f"name PEM files that belong together, and the key's password in {_PREFIX}SSL_KEY_PASSWORD"
            ) from None

    def registry_config(self) -> dict[str, Any] | None:
        """Return the configuration for a SchemaRegistry; None where no registry is set."""
        if not self.schema_registry_url:
            return None
        config: dict[str, Any] = {
            "url": self.schema_registry_url,
            "ssl.ca.location": self.schema_registry_ssl_cafile,
            "ssl.certificate.location": self.schema_registry_ssl_certfile,
            "ssl.key.location": self.schema_registry_ssl_keyfile,
            "ssl.key.password": secret_text(self.schema_registry_ssl_key_password),
        }
        if self.schema_registry_username:
            user, password = self.schema_registry_username, secret_text(self.schema_registry_password)
            config["basic.auth.user.info"] = f"{user}:{password}"
        if self.schema_registry_token:
            config["bearer.auth.token"] = secret_text(self.schema_registry_token)
        config = {name: value for name, value in config.items() if value}
        return {**config, "auto.register.schemas": self.schema_registry_auto_register}
