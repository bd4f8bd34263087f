"""Kafka credentials for Faust and aiokafka, and the OAuth tokens that go with them."""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from base64 import b64encode
from collections.abc import Mapping
from typing import Any, Final
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import faust
import structlog
from aiokafka.abc import AbstractTokenProvider
from faust.transport.drivers.aiokafka import credentials_to_aiokafka_auth

from pipeline.checks import secret_text
from pipeline.errors import ANSWER_SECONDS, ServiceUnavailable
from pipeline.kafka.security import KafkaSecurity

# The share of its life after which a token is replaced. Source: librdkafka's.
_REFRESH_AT: Final = 0.8
# For a token without expires_in, which RFC 6749 allows.
_DEFAULT_LIFE_SECONDS: Final = 60.0

_log = structlog.get_logger(__name__)


def faust_credentials(security: KafkaSecurity) -> Any:
    """Return a Faust app's `broker_credentials`; None for PLAINTEXT."""
    protocol, mechanism = security.kafka_security_protocol, security.kafka_sasl_mechanism
    if protocol == "PLAINTEXT":
        return None
    context = security.tls_context() if protocol in ("SSL", "SASL_SSL") else None
    if protocol == "SSL":
        return faust.SSLCredentials(context)
    if mechanism == "OAUTHBEARER":
        return faust.OAuthCredentials(oauth_cb=TokenProvider(security), ssl_context=context)
    return faust.SASLCredentials(
        username=security.kafka_sasl_username,
        password=secret_text(security.kafka_sasl_password),
        ssl_context=context,
        mechanism=mechanism,
    )


def aiokafka_security(security: KafkaSecurity) -> Mapping[str, Any]:
    """Return an aiokafka client's security arguments."""
    arguments: Mapping[str, Any] = credentials_to_aiokafka_auth(faust_credentials(security))
    return arguments


class TokenProvider(AbstractTokenProvider):
    """Fetches tokens by OAuth's client credentials (RFC 6749, 4.4), which librdkafka does by itself."""

    def __init__(self, security: KafkaSecurity) -> None:
        # Not percent-encoded, against RFC 6749 2.3.1: librdkafka doesn't either, and the server must accept both.
        client = f"{security.kafka_sasl_oauth_client_id}:{secret_text(security.kafka_sasl_oauth_client_secret)}"
        self._url = security.kafka_sasl_oauth_token_url or ""
        self._headers = {
            "Authorization": f"Basic {b64encode(client.encode()).decode()}",
            "Content-Type": "application/x-www-form-urlencoded",
            "Accept": "application/json",
        }
        scope = security.kafka_sasl_oauth_scope
        self._form = urlencode({"grant_type": "client_credentials", **({"scope": scope} if scope else {})}).encode()
        self._context: ssl.SSLContext = security.tls_context()
        self._token = ""
        self._refresh_at = 0.0  # of the monotonic clock

    async def token(self) -> str:
        """Return a valid token, fetched if the last one expires soon.

        Raises:
            ServiceUnavailable: no token could be fetched; aiokafka tries again.
        """
        if time.monotonic() >= self._refresh_at:
            try:
                self._token, life_seconds = await asyncio.to_thread(self._fetch)
            except ServiceUnavailable as error:
                _log.warning("kafka_unavailable", error=str(error))
                raise
            self._refresh_at = time.monotonic() + _REFRESH_AT * life_seconds
        return self._token

    def _fetch(self) -> tuple[str, float]:
        request = Request(self._url, self._form, self._headers)  # noqa: S310  # KafkaSecurity allows http and https only
        try:
            with urlopen(request, timeout=ANSWER_SECONDS, context=self._context) as response:  # noqa: S310
                answer = json.load(response)
            return str(answer["access_token"]), float(answer.get("expires_in", _DEFAULT_LIFE_SECONDS))
        except HTTPError as error:
            error.close()
            reason = f"HTTP {error.code} {error.reason}"
        except URLError as error:
            reason = str(error.reason)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = f"{type(error).__name__}, not a token"
        raise ServiceUnavailable(
            f"no OAuth token from {self._url}: {reason}; check AGENT_METADATA_KAFKA_SASL_OAUTH_*"
        ) from None
