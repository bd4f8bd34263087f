"""OAuth tokens for aiokafka: fetched as librdkafka fetches them, kept while valid; errors show no secret."""

import pytest

from pipeline.errors import ServiceUnavailable
from pipeline.kafka.credentials import TokenProvider
from pipeline.settings import load_settings
from tests.support.secured_kafka import CLIENT_SECRET, USER, token_server


def provider(url, secret=CLIENT_SECRET):
    return TokenProvider(
        load_settings(
            kafka_security_protocol="SASL_PLAINTEXT",
            kafka_sasl_mechanism="OAUTHBEARER",
            kafka_sasl_oauth_token_url=url,
            kafka_sasl_oauth_client_id=USER,
            kafka_sasl_oauth_client_secret=secret,
            kafka_sasl_oauth_scope="kafka",
        )
    )


async def test_token_is_asked_for_with_the_scope_and_kept_while_it_is_good():
    with token_server() as server:
        tokens = provider(server.url)
        assert await tokens.token() == await tokens.token()
    assert [request["form"] for request in server.requests] == ["grant_type=client_credentials&scope=kafka"]


async def test_token_that_is_about_to_expire_is_fetched_again():
    with token_server(life_seconds=0) as server:
        tokens = provider(server.url)
        await tokens.token()
        await tokens.token()
    assert len(server.requests) == 2


async def test_wrong_secret_is_reported_without_showing_it():
    wrong = "-".join(("wrong", "pony"))
    with token_server() as server, pytest.raises(ServiceUnavailable) as refused:
        await provider(server.url, wrong).token()
    assert str(refused.value) == (
        f"no OAuth token from {server.url}: HTTP 401 Unauthorized; check AGENT_METADATA_KAFKA_SASL_OAUTH_*"
    )


async def test_missing_token_server_is_reported():
    with pytest.raises(ServiceUnavailable, match="Connection refused; check AGENT_METADATA_KAFKA_SASL_OAUTH"):
        await provider("http://127.0.0.1:1/token").token()
