"""The schema registry, by confluent-kafka's client: schemas by their ids, and our own schema registered."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple, NoReturn, Self, cast
from urllib.parse import urlsplit

from pipeline.certificates import certificate_complaint
from pipeline.errors import ANSWER_SECONDS, ConfigError, DecodeError, ServiceUnavailable

# Settings; registry_settings.py has them.
URL: Final = "AGENT_METADATA_SCHEMA_REGISTRY_URL"
CA_FILE: Final = "AGENT_METADATA_SCHEMA_REGISTRY_SSL_CAFILE"
SchemaKind = Literal["AVRO", "JSON", "PROTOBUF"]
_KINDS: Final = ("AVRO", "JSON", "PROTOBUF")
_NEEDS: Final = "schemas from a registry need {}: pip install 'agent-metadata-pipeline[formats]'"
AUTO_REGISTER: Final = "auto.register.schemas"
# A schema that refers to more schemas than this is taken for a mistake.
_MOST_REFERENCES: Final = 200
# Source: Confluent's API: ids are Java's int.
_LARGEST_ID: Final = 2**31 - 1
# Source: Confluent's API: no such subject, version, schema.
_NOT_FOUND: Final = (40401, 40402, 40403)
_BUSY: Final = (408, 425, 429)


class UnknownSchema(DecodeError):
    """The registry has no such schema; it may have one in a moment."""


class RegisteredSchema(NamedTuple):
    """A schema as the registry holds it.

    `references` are the texts of the schemas that it refers to, by the names that it does so by, each after those that
    it refers to itself.
    """

    kind: SchemaKind
    text: str
    references: dict[str, str]


class SchemaRegistry:
    """A registry with Confluent's API; usable from several threads.

    Guarantee: one request takes ANSWER_SECONDS at most to connect, and as long between two bytes of an answer. It is
    not tried again here: callers hold and come back.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Make a client; it connects when it is first asked.

        Args:
            config: confluent_kafka.schema_registry.SchemaRegistryClient's configuration: `url`, `basic.auth.user.info`,
                `ssl.ca.location`, ...; `bearer.auth.token` alone is enough for a token, and `auto.register.schemas` is
                as for confluent-kafka's serializers: False makes `register` look only.

        Raises:
            ConfigError: the extra [formats] is not installed, or the configuration is wrong.
        """
        try:
            import fastavro  # noqa: F401  # what reads the schemas: better missed now than at the first record
            import grpc_tools  # noqa: F401
            from confluent_kafka.schema_registry import SchemaRegistryClient
            from google.protobuf import message  # noqa: F401
        except ImportError as error:
            raise ConfigError(_NEEDS.format(error.name)) from None
        settings = {"timeout": ANSWER_SECONDS, **config, "max.retries": 0}
        self._may_register = bool(settings.pop(AUTO_REGISTER, True))
        if "bearer.auth.token" in settings:
            settings = {"bearer.auth.credentials.source": "STATIC_TOKEN", "bearer.auth.logical.cluster": "", **settings}
        try:
            self._client = SchemaRegistryClient(settings)
        except (ValueError, TypeError, OSError) as error:
            raise ConfigError(f"the schema registry's configuration can't be used: {error}") from None
        self._place = ", ".join(_without_secrets(url) for url in str(config["url"]).split(","))

    def fetch(self, schema_id: int | str) -> RegisteredSchema:
        """Ask for a schema, by its number or GUID, and for those that it refers to.

        Raises:
            UnknownSchema: the registry has none of this id, or lacks one that it refers to.
            DecodeError: it is of a kind that can't be read.
            ServiceUnavailable: the registry can't be reached, is busy, or does not answer as a registry does.
            ConfigError: it refuses this client or the request, its certificate is refused, or no registry is at this
                URL.
        """
        if isinstance(schema_id, int) and schema_id > _LARGEST_ID:
            raise UnknownSchema(f"no schema registry has a schema {schema_id}: ids end at {_LARGEST_ID}")
        try:
            if isinstance(schema_id, int):
                schema = self._client.get_schema(schema_id)
            else:
                schema = self._client.get_schema_by_guid(schema_id)
            kind = schema.schema_type or "AVRO"
            references: dict[str, str] = {}
            self._add_references(schema, references)
            text = str(schema.schema_str)
        except (DecodeError, ConfigError):
            raise
        except Exception as error:  # its own, httpx's, and whatever an answer in another form makes it raise
            self._explain(error, f"schema {schema_id}")
        finally:
            self._client.clear_caches()  # it would remember every schema, and never forget any
        if kind not in _KINDS:
            raise DecodeError(f"schema {schema_id} is of the kind {kind[:32]!r}, which can't be read")
        return RegisteredSchema(cast(SchemaKind, kind), text, references)

    def register(self, subject: str, kind: SchemaKind, text: str) -> int:
        """Register a schema under a subject, unless it is there already; return its id.

        Raises:
            ServiceUnavailable: as for fetch().
            ConfigError: as for fetch(); or the registry refuses the schema, or lacks it and it may not be registered.
        """
        from confluent_kafka.schema_registry import Schema

        schema = Schema(text, kind)
        try:
            if self._may_register:
                return int(self._client.register_schema(subject, schema))
            return int(self._client.lookup_schema(subject, schema).schema_id)
        except Exception as error:  # as above
            code = getattr(error, "http_status_code", None)
            if code in (409, 422):
                raise ConfigError(
                    f"the schema registry at {self._place} refuses our schema under the subject {subject}: "
                    f"{_said(error)}; give the topic a subject of its own, or change the subject's compatibility"
                ) from error
            try:
                self._explain(error, f"the subject {subject}")
            except UnknownSchema:
                raise ConfigError(
                    f"our schema is not registered under the subject {subject} of {self._place}: register it, or let "
                    f"{AUTO_REGISTER} be true"
                ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def _add_references(self, schema: Any, found: dict[str, str]) -> None:
        for reference in schema.references or ():
            if reference.name in found:
                continue
            if len(found) >= _MOST_REFERENCES:
                raise DecodeError(f"a schema that refers to more than {_MOST_REFERENCES} others can't be read")
            found[reference.name] = ""  # before its own: a circle ends here
            referred = self._client.get_version(reference.subject, reference.version).schema
            self._add_references(referred, found)
            del found[reference.name]  # behind its own
            found[reference.name] = str(referred.schema_str)

    def _explain(self, error: Exception, wanted: str) -> NoReturn:
        """Raise what says what to do about an error of the client."""
        code = getattr(error, "http_status_code", None)
        if code is None:
            self._explain_failure(error)
        if code in (401, 403, 407):
            raise ConfigError(
                f"the schema registry at {self._place} refuses this client (HTTP {code}: {_said(error)}): check the "
                "user and password, or the token, and its rights"
            ) from error
        if code >= 500 or code in _BUSY:
            raise ServiceUnavailable(
                f"the schema registry at {self._place} is unavailable (HTTP {code}: {_said(error)})"
            ) from error
        is_unknown = getattr(error, "error_code", None) in _NOT_FOUND
        if code < 400:
            raise ConfigError(f"{self._place} redirects (HTTP {code}): set the URL that it redirects to") from error
        if code != 404 and not is_unknown:
            raise ConfigError(
                f"{self._place} refuses a request for {wanted} (HTTP {code}: {_said(error)}): check {URL}, the "
                "client certificate, and any proxy in between"
            ) from error
        if not is_unknown:
            self._require_registry()
        raise UnknownSchema(f"the schema registry has no {wanted} (HTTP {code}: {_said(error)})") from error

    def _require_registry(self) -> None:
        """Return if there is a registry that does not know a path, such as that of GUIDs, rather than none at all."""
        try:
            if isinstance(self._client.get_schema_types(), list):
                return
        except Exception as error:  # as above
            if getattr(error, "http_status_code", None) != 404:
                self._explain(error, "list of schema types")
        raise ConfigError(
            f"no schema registry is at {self._place}: give its path too, such as /apis/ccompat/v7 of Apicurio's"
        )

    def _explain_failure(self, error: Exception) -> NoReturn:
        from confluent_kafka.schema_registry.common._httpx_compat import httpx

        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                complaint = certificate_complaint(cause, ca_setting=CA_FILE)
                raise ConfigError(f"the certificate of the schema registry at {self._place}: {complaint}") from error
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, httpx.TransportError):
            reason = f"{type(error).__name__} {error}".strip()
            raise ServiceUnavailable(f"the schema registry at {self._place} does not answer ({reason})") from error
        raise ServiceUnavailable(
            f"{self._place} does not answer as a schema registry does ({type(error).__name__}): is {URL} its URL?"
        ) from error


def _said(error: Exception) -> str:
    return " ".join(str(getattr(error, "error_message", None) or "no reason given").split())[:200]


def _without_secrets(url: str) -> str:
    parts = urlsplit(url.strip())
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
