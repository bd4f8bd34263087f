"""Settings of the schema registry: combinations that can't work are refused, without showing a secret."""

import pytest
import trustme

from pipeline.errors import ConfigError
from pipeline.settings import load_settings

PREFIX = "AGENT_METADATA_SCHEMA_REGISTRY_"
SECRET = "hunter2"
URL = {"URL": "https://registry:8081"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pem")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name in ("one", "two"):
        leaf = authority.issue_cert("client")
        leaf.cert_chain_pems[0].write_to_path(folder / f"{name}.pem")
        leaf.private_key_pem.write_to_path(folder / f"{name}.key")
    (folder / "text.pem").write_text("no certificate")
    return folder


def load(monkeypatch, values):
    for name, value in values.items():
        monkeypatch.setenv(PREFIX + name, str(value))
    return load_settings()


WRONG = [
    ({"USERNAME": "me", "PASSWORD": SECRET}, "USERNAME has no use without .*URL"),
    ({"TOKEN": SECRET}, "TOKEN has no use without .*URL"),
    ({"URL": f"https://me:{SECRET}@registry"}, "URL holds a user or a password: use .*USERNAME"),
    ({"URL": f"{SECRET}:8081"}, "must be a URL"),
    ({"URL": "https://one, ftp://two"}, "must be a URL"),
    ({**URL, "USERNAME": "me"}, "PASSWORD is missing with .*USERNAME"),
    ({**URL, "PASSWORD": SECRET}, "USERNAME is missing with .*PASSWORD"),
    ({**URL, "USERNAME": "m:e", "PASSWORD": SECRET}, "has a colon"),
    ({**URL, "USERNAME": "me", "PASSWORD": SECRET, "TOKEN": SECRET}, "TOKEN has no use with"),
    ({**URL, "TOKEN": f"{SECRET} "}, "may contain only letters"),
    ({**URL, "SSL_CERTFILE": "{one.pem}"}, "SSL_KEYFILE is missing"),
    ({**URL, "SSL_KEYFILE": "{one.key}"}, "SSL_CERTFILE is missing"),
    ({**URL, "SSL_KEY_PASSWORD": SECRET}, "SSL_KEY_PASSWORD has no use without"),
    ({**URL, "SSL_CAFILE": "{none.pem}"}, "no such file"),
    ({**URL, "SSL_CAFILE": "{text.pem}"}, "holds no CA certificate"),
    ({**URL, "SSL_CERTFILE": "{one.pem}", "SSL_KEYFILE": "{two.key}"}, "belong together"),
]


@pytest.mark.parametrize(("values", "complaint"), WRONG)
def test_combination_that_can_not_work_is_refused(monkeypatch, files, values, complaint):
    paths = {name: text.replace("{", f"{files}/").replace("}", "") for name, text in values.items()}
    with pytest.raises(ConfigError, match=complaint) as raised:
        load(monkeypatch, paths)
    assert SECRET not in str(raised.value)


def test_settings_become_the_clients_configuration(monkeypatch, files):
    values = {"SSL_CAFILE": files / "ca.pem", "SSL_CERTFILE": files / "one.pem", "SSL_KEYFILE": files / "one.key"}
    settings = load(monkeypatch, {**URL, **values, "USERNAME": "me", "PASSWORD": SECRET, "AUTO_REGISTER": "false"})
    assert settings.registry_config() == {
        "url": URL["URL"],
        "basic.auth.user.info": f"me:{SECRET}",
        "ssl.ca.location": str(files / "ca.pem"),
        "ssl.certificate.location": str(files / "one.pem"),
        "ssl.key.location": str(files / "one.key"),
        "auto.register.schemas": False,
    }
    assert SECRET not in repr(settings)


def test_token_becomes_the_clients_configuration(monkeypatch):
    assert load(monkeypatch, {**URL, "TOKEN": SECRET}).registry_config()["bearer.auth.token"] == SECRET


def test_without_a_url_there_is_no_registry():
    assert load_settings().registry_config() is None
