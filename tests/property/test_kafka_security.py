"""Whatever Kafka's security settings are, they are refused by name, or both kinds of clients use every one of them."""

import os
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from pipeline.kafka.credentials import aiokafka_security
from pipeline.kafka.security import PREFIX, KafkaSecurity
from tests.support.secured_kafka import CLIENT_SECRET, PASSWORD, USER

SECRETS = (PASSWORD, CLIENT_SECRET)
VARIABLES = {PREFIX + name.upper() for name in KafkaSecurity.model_fields}
VALUES = {
    "kafka_security_protocol": st.sampled_from(["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"]),
    "kafka_ssl_key_password": st.just(PASSWORD),
    "kafka_sasl_mechanism": st.sampled_from(["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"]),
    "kafka_sasl_username": st.just(USER),
    "kafka_sasl_password": st.just(PASSWORD),
    "kafka_sasl_oauth_token_url": st.sampled_from(["https://sso/token", f"https://u:{PASSWORD}@sso/token", "sso"]),
    "kafka_sasl_oauth_client_id": st.just(USER),
    "kafka_sasl_oauth_client_secret": st.just(CLIENT_SECRET),
    "kafka_sasl_oauth_scope": st.just("kafka"),
}
SCRAM = {
    "kafka_security_protocol": "SASL_SSL",
    "kafka_sasl_mechanism": "SCRAM-SHA-512",
    "kafka_sasl_username": USER,
    "kafka_sasl_password": PASSWORD,
}
OAUTH = {
    "kafka_security_protocol": "SASL_PLAINTEXT",
    "kafka_sasl_mechanism": "OAUTHBEARER",
    "kafka_sasl_oauth_token_url": "https://sso/token",
    "kafka_sasl_oauth_client_id": USER,
    "kafka_sasl_oauth_client_secret": CLIENT_SECRET,
    "kafka_sasl_oauth_scope": "kafka",
}


@pytest.fixture(autouse=True, scope="module")
def _clean_environment():
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith((PREFIX, "KAFKA_"))]:
            patch.delenv(name)
        yield


@given(settings=st.fixed_dictionaries({}, optional=VALUES))
@example(settings={})
@example(settings={"kafka_security_protocol": "SSL"})
@example(settings=SCRAM)
@example(settings=OAUTH)
def test_settings_are_refused_by_name_or_all_used_by_both_clients(settings):
    try:
        security = KafkaSecurity(**settings)
    except ValidationError as refused:
        (refusal,) = refused.errors()
        named = set(re.findall(rf"{PREFIX}\w+", refusal["msg"]))
        assert named
        assert named <= VARIABLES
        assert all(secret not in refusal["msg"] for secret in SECRETS)
        return
    assert all(value in security.client_config().values() for value in settings.values())
    assert all(secret not in repr(security) for secret in SECRETS)
    aiokafka = aiokafka_security(security)
    assert aiokafka["security_protocol"] == security.kafka_security_protocol
    assert (aiokafka.get("ssl_context") is not None) == security.kafka_security_protocol.endswith("SSL")
    if security.kafka_security_protocol.startswith("SASL"):
        assert aiokafka["sasl_mechanism"] == security.kafka_sasl_mechanism
    if security.kafka_sasl_password:
        assert (aiokafka["sasl_plain_username"], aiokafka["sasl_plain_password"]) == (USER, PASSWORD)
    assert (aiokafka.get("sasl_oauth_token_provider") is not None) == (security.kafka_sasl_mechanism == "OAUTHBEARER")
