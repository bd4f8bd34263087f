"""Kafka's security settings: impossible combinations are refused before anything starts, and no secret is shown."""

import os

import pytest

from pipeline.errors import ConfigError
from pipeline.settings import describe_settings, load_settings
from tests.support.secured_kafka import PASSWORD, pem_files

SCRAM = {"security_protocol": "SASL_SSL", "sasl_mechanism": "SCRAM-SHA-512"}
USER = {"sasl_username": "u", "sasl_password": PASSWORD}
OAUTH = {
    "security_protocol": "SASL_SSL",
    "sasl_mechanism": "OAUTHBEARER",
    "sasl_oauth_token_url": "https://sso/token",
    "sasl_oauth_client_id": "u",
    "sasl_oauth_client_secret": PASSWORD,
}
PROTOCOL = "AGENT_METADATA_KAFKA_SECURITY_PROTOCOL"
MECHANISM = "AGENT_METADATA_KAFKA_SASL_MECHANISM"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AGENT_METADATA_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)  # where there is no PEM file


@pytest.fixture(scope="module")
def pem(tmp_path_factory):
    return {name: str(file) for name, file in pem_files(tmp_path_factory.mktemp("pem")).items()}


def kafka(**settings):
    return load_settings(**{f"kafka_{name}": value for name, value in settings.items()})


def refusal(**settings):
    with pytest.raises(ConfigError) as refused:
        kafka(**settings)
    message = str(refused.value)
    assert PASSWORD not in message
    assert "\n" not in message
    return message


def without(settings, name):
    return {key: value for key, value in settings.items() if key != name}


@pytest.mark.parametrize(
    ("settings", "named", "advice"),
    [
        ({"security_protocol": "SASL_SSL"}, f"{MECHANISM} is missing with {PROTOCOL}=SASL_SSL", "SCRAM-SHA-512 or"),
        (
            {"sasl_mechanism": "PLAIN"},
            f"{MECHANISM}=PLAIN has no use with {PROTOCOL}=PLAINTEXT",
            "set that to SASL_SSL or SASL_PLAINTEXT, or unset it",
        ),
        (
            {"security_protocol": "SSL", "sasl_password": PASSWORD},
            f"AGENT_METADATA_KAFKA_SASL_PASSWORD has no use with {PROTOCOL}=SSL",
            "unset it",
        ),
        ({**SCRAM, **without(USER, "sasl_username")}, "AGENT_METADATA_KAFKA_SASL_USERNAME is missing", "set it"),
        ({**SCRAM, **without(USER, "sasl_password")}, "AGENT_METADATA_KAFKA_SASL_PASSWORD is missing", "set it"),
        ({**SCRAM, **USER, "sasl_password": ""}, "AGENT_METADATA_KAFKA_SASL_PASSWORD is missing", "set it"),
        (
            {**SCRAM, **USER, "sasl_oauth_scope": "kafka"},
            f"AGENT_METADATA_KAFKA_SASL_OAUTH_SCOPE=kafka has no use with {MECHANISM}=SCRAM-SHA-512",
            "unset it",
        ),
        (without(OAUTH, "sasl_oauth_client_secret"), "AGENT_METADATA_KAFKA_SASL_OAUTH_CLIENT_SECRET is missing", "set"),
        ({**OAUTH, **USER}, f"AGENT_METADATA_KAFKA_SASL_USERNAME=u has no use with {MECHANISM}=OAUTHBEARER", "unset"),
        ({**OAUTH, "sasl_oauth_token_url": "sso/token"}, "AGENT_METADATA_KAFKA_SASL_OAUTH_TOKEN_URL", "https://"),
        (
            {**OAUTH, "sasl_oauth_token_url": f"https://u:{PASSWORD}@sso/token"},
            "AGENT_METADATA_KAFKA_SASL_OAUTH_TOKEN_URL holds a user or a password",
            "use AGENT_METADATA_KAFKA_SASL_OAUTH_CLIENT_ID",
        ),
        (
            {"sasl_oauth_token_url": f"https://u:{PASSWORD}@sso/token"},
            f"AGENT_METADATA_KAFKA_SASL_OAUTH_TOKEN_URL has no use with {PROTOCOL}=PLAINTEXT",
            "unset it",
        ),
        ({"ssl_cafile": "ca.pem"}, "AGENT_METADATA_KAFKA_SSL_CAFILE=ca.pem has no use", "set that to SSL or SASL_SSL"),
        (
            {"security_protocol": "SSL", "ssl_cafile": "none.pem"},
            "AGENT_METADATA_KAFKA_SSL_CAFILE=none.pem: no such file",
            "name a PEM file",
        ),
        (
            {"security_protocol": "SSL", "ssl_certfile": "client.pem"},
            "AGENT_METADATA_KAFKA_SSL_KEYFILE is missing with AGENT_METADATA_KAFKA_SSL_CERTFILE",
            "set both",
        ),
        (
            {"security_protocol": "SSL", "ssl_key_password": PASSWORD},
            "AGENT_METADATA_KAFKA_SSL_KEY_PASSWORD has no use without AGENT_METADATA_KAFKA_SSL_KEYFILE",
            "unset it",
        ),
    ],
)
def test_impossible_combination_is_named_with_what_is_allowed(settings, named, advice):
    message = refusal(**settings)
    assert named in message
    assert advice in message


def test_file_without_a_certificate_is_named(tmp_path):
    file = tmp_path / "text.pem"
    file.write_text("no PEM")
    assert refusal(security_protocol="SSL", ssl_cafile=str(file)) == (
        f"AGENT_METADATA_KAFKA_SSL_CAFILE={file} holds no CA certificate: name a PEM file"
    )


@pytest.mark.parametrize(
    ("files", "password", "complaint"),
    [
        (("ca", "client"), None, "is not the key of"),
        (("client", "ca"), None, "holds no private key"),
        (("encrypted_key", "client"), None, "holds no certificate"),
        (("client", "encrypted_key"), None, "give its password in AGENT_METADATA_KAFKA_SSL_KEY_PASSWORD"),
        (("client", "encrypted_key"), "wrong", "give its password in AGENT_METADATA_KAFKA_SSL_KEY_PASSWORD"),
    ],
)
def test_client_certificate_that_can_not_be_used_is_named(pem, files, password, complaint):
    certificate, key = (pem[name] for name in files)
    message = refusal(security_protocol="SSL", ssl_certfile=certificate, ssl_keyfile=key, ssl_key_password=password)
    assert complaint in message


@pytest.mark.parametrize("key", ["client", "encrypted_key"])
def test_client_certificate_is_taken_with_its_key(pem, key):
    password = PASSWORD if key == "encrypted_key" else None
    settings = kafka(
        security_protocol="SSL", ssl_certfile=pem["client"], ssl_keyfile=pem[key], ssl_key_password=password
    )
    assert settings.client_config()["ssl.key.location"] == pem[key]


@pytest.mark.parametrize("settings", [{**SCRAM, **USER}, OAUTH])
@pytest.mark.parametrize("render", [repr, str, describe_settings, lambda settings: repr(settings.model_dump())])
def test_settings_shown_do_not_show_secrets(settings, render):
    assert PASSWORD not in str(render(kafka(**settings)))


@pytest.mark.parametrize("name", ["sasl_password", "sasl_oauth_client_secret", "ssl_key_password"])
def test_secret_of_a_wrong_type_is_not_shown(name):
    message = refusal(**{name: [PASSWORD]})
    assert message.startswith(f"AGENT_METADATA_KAFKA_{name.upper()}: ")
