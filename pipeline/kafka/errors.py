"""librdkafka's errors: which mean that nobody answered, and what to tell whoever waits for Kafka."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import structlog
from confluent_kafka import KafkaError, KafkaException

from pipeline.errors import ServiceUnavailable
from pipeline.kafka.tls import why_certificate_refused

# Codes that mean no broker answered; the last error that librdkafka reported then says more than the code.
SILENCE: Final = (
    KafkaError._TRANSPORT,
    KafkaError._TIMED_OUT,
    KafkaError._ALL_BROKERS_DOWN,
    KafkaError._RESOLVE,
    KafkaError._AUTHENTICATION,
    KafkaError._SSL,
    KafkaError._DESTROY,
)
# Errors that waiting doesn't fix: librdkafka would keep trying until the time is up.
_REFUSALS: Final = (KafkaError._AUTHENTICATION, KafkaError._SSL)

_log = structlog.get_logger(__name__)


def code_of(error: KafkaException) -> int:
    """Return the code of the KafkaError that an exception carries, one of KafkaError's constants."""
    code: int = error.args[0].code()
    return code


def log_unavailable(error: KafkaError, log: Any = _log) -> None:
    """Log an error that librdkafka recovers from by itself; the `error_cb` of clients that wait for it to do so."""
    log.warning("kafka_unavailable", error=error.str())


class LastError:
    """The last error that a client reported by its `error_cb`: it says why an operation failed, the operation doesn't.

    `client_config` is the client's, from which error messages name the servers and settings.
    """

    def __init__(self, client_config: Mapping[str, Any]) -> None:
        self._servers = client_config.get("bootstrap.servers", "")
        self._protocol = client_config.get("security.protocol", "PLAINTEXT")
        self._ca_file = client_config.get("ssl.ca.location")
        self._error: KafkaError | None = None

    def note(self, error: KafkaError) -> None:
        """Remember an error; the client's `error_cb`."""
        # "1/1 brokers are down" comes after the reason and says less.
        if self._error is None or error.code() != KafkaError._ALL_BROKERS_DOWN:
            self._error = error

    @property
    def is_refusal(self) -> bool:
        """Tell whether the broker and this client don't accept each other, which waiting doesn't fix."""
        return self._error is not None and self._error.code() in _REFUSALS

    def unavailable(self, error: KafkaException) -> ServiceUnavailable:
        """Return what to raise for an operation's error: what happened and what to do, in one line.

        If a certificate may be the cause, this connects to the servers to learn what is wrong with it.
        """
        reason: KafkaError = error.args[0]
        if reason.code() == KafkaError._UNSUPPORTED_FEATURE:
            return ServiceUnavailable(
                f"Kafka at {self._servers} is too old for this, or is the embedded broker, for demos"
            )
        if reason.code() not in SILENCE:
            answer = reason.str().removeprefix("Broker: ").rstrip(".")
            return ServiceUnavailable(
                f"Kafka at {self._servers} answered: {answer}; try again, and check this user's rights"
            )
        cause = self._error or reason
        # The state of the connection helps only those who write clients.
        text = re.sub(r" \(after \d+ms in state \w+\)", "", cause.str())
        if cause.code() == KafkaError._AUTHENTICATION:
            text = f"refuses this client: {text}; check AGENT_METADATA_KAFKA_SASL_*"
        elif cause.code() == KafkaError._SSL and (why := why_certificate_refused(self._servers, self._ca_file)):
            text = f"can't be trusted: {why}"
        else:
            text = (
                f"can't be reached: {text}; is it up, and is the address right? "
                f"Does it speak {self._protocol} (AGENT_METADATA_KAFKA_SECURITY_PROTOCOL)?"
            )
        return ServiceUnavailable(f"Kafka at {self._servers} {text}")
