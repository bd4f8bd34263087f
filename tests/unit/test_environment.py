"""Variables that look like settings: Kubernetes' are ignored, mistakes are refused, and no value is shown."""

import logging

import pytest

from pipeline.errors import ConfigError
from pipeline.settings import PREFIX, Settings, describe_settings, load_settings

SECRET = "s3cret"


def service(name, *, protocol="TCP", port="8080", port_name="HTTP"):
    """What Kubernetes injects for a Service of one port."""
    address, link = "10.0.0.1", f"{name}_PORT_{port}_{protocol}"
    url = f"{protocol.lower()}://{address}:{port}"
    return {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": port,
        f"{name}_SERVICE_PORT_{port_name}": port,
        f"{name}_PORT": url,
        link: url,
        f"{link}_PROTO": protocol.lower(),
        f"{link}_PORT": port,
        f"{link}_ADDR": address,
    }


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Set variables; at first there are none that a setting has."""
    for variable, *_ in describe_settings(Settings()):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.removeprefix(PREFIX), raising=False)

    def set_variables(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("protocol", ["TCP", "UDP", "SCTP"])
@pytest.mark.parametrize(
    "name",
    ["AGENT_METADATA", "AGENT_METADATA_SERVE", "AGENT_METADATA_METRICS", "AGENT_METADATA_SERVICE", "KAFKA", "DATABASE"],
)
def test_service_of_this_name_does_no_harm(environment, name, protocol):
    environment(service(name, protocol=protocol))
    assert load_settings() == Settings.model_construct()


def test_service_named_as_a_setting_leaves_the_file_in_force(environment, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("serve_port = 9000\n")
    environment({**service("AGENT_METADATA_SERVE"), "AGENT_METADATA_CONFIG_FILE": str(file)})
    settings = load_settings()
    described = {variable: rest for variable, *rest in describe_settings(settings)}
    assert described["AGENT_METADATA_SERVE_PORT"] == ["9000", str(file)]


def test_own_value_overrides_the_port_of_a_service(environment):
    environment({**service("AGENT_METADATA_SERVE"), "AGENT_METADATA_SERVE_PORT": "9001"})
    assert load_settings().serve_port == 9001


def test_ignored_variables_are_named_in_one_debug_line(environment, caplog):
    links = service("AGENT_METADATA_SERVE")
    environment(links)
    with caplog.at_level(logging.DEBUG, logger="pipeline.settings"):
        load_settings()
    (line,) = caplog.messages
    assert set(links) == set(line.partition(": ")[2].split(", "))


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("AGENT_METADATA_SERVICE_HOST", "0.0.0.0", "AGENT_METADATA_SERVE_HOST"),
        ("AGENT_METADATA_SERVICE_PORT", "8080", "AGENT_METADATA_SERVE_PORT"),
        ("AGENT_METADATA_SERV_PORT", "8080", "AGENT_METADATA_SERVE_PORT"),
        ("AGENT_METADATA_METRICS_PORTS", "tcp://10.0.0.1:1", "AGENT_METADATA_METRICS_PORT"),
    ],
)
def test_mistyped_setting_is_no_service(environment, name, value, meant):
    environment({name: value})
    with pytest.raises(ConfigError, match=f"^{name} is not a setting; did you mean {meant}"):
        load_settings()


def test_mistyped_setting_beside_a_service_is_refused(environment):
    environment({**service("AGENT_METADATA_SERVE"), "AGENT_METADATA_PARTITION": "3"})
    with pytest.raises(ConfigError, match="AGENT_METADATA_PARTITION is not a setting"):
        load_settings()


KAFKA = [name.upper() for name in Settings.model_fields if name.startswith("kafka_s")]


def test_settings_of_kafka_are_found():
    assert {"KAFKA_SECURITY_PROTOCOL", "KAFKA_SSL_CAFILE", "KAFKA_SASL_PASSWORD"} <= set(KAFKA)


@pytest.mark.parametrize("name", KAFKA)
def test_kafka_setting_without_its_prefix_is_refused_with_the_name_it_needs(environment, name):
    environment({name: SECRET})
    with pytest.raises(ConfigError, match=f"^{name} would be ignored.*: set {PREFIX}{name};") as refused:
        load_settings()
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_kafka_settings_without_their_prefix_are_all_named_at_once(environment):
    environment({"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", "KAFKA_SASL_PASSWORD": SECRET})
    with pytest.raises(ConfigError) as refused:
        load_settings()
    for name in ("KAFKA_SECURITY_PROTOCOL", "KAFKA_SASL_PASSWORD"):
        assert f"{PREFIX}{name}" in str(refused.value)


def test_kafka_setting_of_another_program_may_be_set_beside_ours(environment):
    environment({"KAFKA_SECURITY_PROTOCOL": "SASL_SSL", f"{PREFIX}KAFKA_SECURITY_PROTOCOL": "SSL"})
    assert load_settings().kafka_security_protocol == "SSL"


@pytest.mark.parametrize("name", ["KAFKA_SSL_TRUSTSTORE_LOCATION", "KAFKA_HEAP_OPTS", "KAFKA_SASL_JAAS_CONFIG"])
def test_variable_that_is_a_broker_s_alone_is_none_of_ours(environment, name):
    environment({name: "x"})
    load_settings()


def test_empty_variable_without_the_prefix_sets_nothing(environment):
    environment({"KAFKA_SECURITY_PROTOCOL": ""})
    assert load_settings().kafka_security_protocol == "PLAINTEXT"
