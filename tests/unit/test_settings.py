"""Settings: a wrong one is named, with its value and what is allowed, and never with a password."""

import pytest

from pipeline.errors import ConfigError
from pipeline.settings import PREFIX, Settings, describe_settings, load_settings

VARIABLES = {
    name: str(field.validation_alias or PREFIX + name.upper()) for name, field in Settings.model_fields.items()
}


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for variable in VARIABLES.values():
        monkeypatch.delenv(variable, raising=False)


WRONG = [
    ("KAFKA_BOOTSTRAP_SERVERS", "localhost", "not host:port"),
    ("KAFKA_BOOTSTRAP_SERVERS", "a:9092,b", "'b' is not host:port"),
    ("KAFKA_BOOTSTRAP_SERVERS", ":9092", "not host:port"),
    ("KAFKA_BOOTSTRAP_SERVERS", "a:99999", "not host:port"),
    ("KAFKA_BOOTSTRAP_SERVERS", "", "not host:port"),
    ("AGENT_METADATA_KAFKA_SECURITY_PROTOCOL", "TLS", "'PLAINTEXT', 'SSL', 'SASL_PLAINTEXT' or 'SASL_SSL'"),
    ("AGENT_METADATA_KAFKA_SASL_MECHANISM", "GSSAPI", "'PLAIN', 'SCRAM-SHA-256', 'SCRAM-SHA-512' or 'OAUTHBEARER'"),
    ("AGENT_METADATA_BRIDGE_POLL_SECONDS", "0", "must be a number from 0.1 to 3600"),
    ("AGENT_METADATA_EVENTS_TOPIC", "two words", "1 to 249 letters, digits, '.', '_' or '-'"),
    ("AGENT_METADATA_BATCHES_TOPIC", "", "1 to 249 letters, digits, '.', '_' or '-'"),
    ("AGENT_METADATA_DEAD_LETTER_TOPIC", "t" * 250, "1 to 249 letters, digits, '.', '_' or '-'"),
    ("AGENT_METADATA_CONSUMER_GROUP", "", "at least 1 character"),
    ("AGENT_METADATA_PARTITIONS", "0", "must be a whole number from 1 to 1024"),
    ("AGENT_METADATA_PARTITIONS", "1025", "must be a whole number from 1 to 1024"),
    ("AGENT_METADATA_PARTITIONS", "many", "must be a whole number from 1 to 1024"),
    ("AGENT_METADATA_TOPIC_REPLICATION", "0", "must be auto, or a whole number from 1 to 99"),
    ("AGENT_METADATA_TOPIC_REPLICATION", "100", "must be auto, or a whole number from 1 to 99"),
    ("AGENT_METADATA_TOPIC_MIN_INSYNC_REPLICAS", "all", "must be auto, or a whole number from 1 to 99"),
    ("AGENT_METADATA_WINDOW_SECONDS", "0.09", "must be a number from 0.1 to 3600"),
    ("AGENT_METADATA_WINDOW_SECONDS", "3601", "must be a number from 0.1 to 3600"),
    ("AGENT_METADATA_WINDOW_SECONDS", "nan", "must be a number from 0.1 to 3600"),
    ("AGENT_METADATA_BATCH_SIZE", "0", "must be a whole number from 1 to 10000"),
    ("AGENT_METADATA_BATCH_SIZE", "10001", "must be a whole number from 1 to 10000"),
    ("AGENT_METADATA_WINDOW_CAPACITY", "0", "must be a whole number from 1 to 5000000"),
    ("AGENT_METADATA_WINDOW_CAPACITY", "5000001", "must be a whole number from 1 to 5000000"),
    ("AGENT_METADATA_OPEN_WINDOWS_BYTES", "1000", "must be a whole number from 1048576 to 1073741824"),
    ("AGENT_METADATA_UNDECLARED", "drop", "'insert' or 'ignore'"),
    ("AGENT_METADATA_NOTIFY", "yes", "'on' or 'off'"),
    ("AGENT_METADATA_UNLOGGED", "maybe", "must be true or false"),
    ("AGENT_METADATA_MAX_CLOCK_SKEW_SECONDS", "-1", "must be a number from 0 to 86400"),
    ("AGENT_METADATA_MAX_CLOCK_SKEW_SECONDS", "inf", "must be a number from 0 to 86400"),
    ("AGENT_METADATA_SESSION_TIMEOUT_SECONDS", "0.5", "must be a number from 1 to 300"),
    ("AGENT_METADATA_SESSION_TIMEOUT_SECONDS", "301", "must be a number from 1 to 300"),
    ("AGENT_METADATA_EVENTS_FORMAT", "otlp", "'json', 'otlp_json' or 'otlp_proto'"),
    ("AGENT_METADATA_MAPPING", "x", "must be a table of the TOML file"),
    ("AGENT_METADATA_OTLP", "{", "must be a table of the TOML file"),
    ("AGENT_METADATA_STUCK_SECONDS", "14", "must be a number from 15 to 3600"),
    ("AGENT_METADATA_STUCK_SECONDS", "3601", "must be a number from 15 to 3600"),
    ("AGENT_METADATA_METRICS_PORT", "-1", "must be a whole number from 0 to 65535"),
    ("AGENT_METADATA_METRICS_PORT", "65536", "must be a whole number from 0 to 65535"),
    ("AGENT_METADATA_METRICS_PREFIX", "coder_", "'agent_metadata_' or 'coderd_agentapi_metadata_'"),
    ("AGENT_METADATA_SERVE_HOST", "", "at least 1 character"),
    ("AGENT_METADATA_SERVE_PORT", "-1", "must be a whole number from 0 to 65535"),
    ("AGENT_METADATA_SERVE_PORT", "65536", "must be a whole number from 0 to 65535"),
    ("AGENT_METADATA_SERVE_MAX_PAIRS", "0", "must be a whole number from 1 to 100000000"),
    ("AGENT_METADATA_SERVE_CORS_ORIGINS", "*", "origins such as https://example.org"),
    ("AGENT_METADATA_SERVE_CORS_ORIGINS", "https://a.example/path", "origins such as https://example.org"),
    ("AGENT_METADATA_LOG_FORMAT", "xml", "'console' or 'json'"),
]
URLS = ("DATABASE_URL", "DATABASE_LISTEN_URL", "AGENT_METADATA_BRIDGE_DATABASE_URL")
TOKENS = ("AGENT_METADATA_SERVE_TOKEN", "AGENT_METADATA_SERVE_REPORTS_TOKEN")
SECRET = {*URLS, *TOKENS}


@pytest.mark.parametrize(("variable", "value", "allowed"), WRONG)
def test_wrong_variable_is_named_with_its_value_and_what_is_allowed(monkeypatch, variable, value, allowed):
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as raised:
        load_settings()
    message = str(raised.value)
    assert message.startswith(f"{variable}={value!r}: ")
    assert allowed in message
    assert "\n" not in message


def test_wrong_variables_cover_every_setting():
    # Any text will do for these alone; the tests of kafka/security.py and formats/registry_settings.py have the
    # combinations that are wrong.
    prefixes = ("AGENT_METADATA_KAFKA_S", "AGENT_METADATA_SCHEMA_REGISTRY_", "DATABASE_")
    texts = {name for name in VARIABLES.values() if name.startswith(prefixes)}
    assert {variable for variable, *_ in WRONG} | texts | SECRET == set(VARIABLES.values())


@pytest.mark.parametrize("name", sorted(VARIABLES))
def test_wrong_override_is_named_as_its_variable(name):
    with pytest.raises(ConfigError) as raised:
        load_settings(**{name: object()})
    assert str(raised.value).startswith(VARIABLES[name])


def test_wrong_settings_are_all_named_at_once(monkeypatch):
    monkeypatch.setenv("AGENT_METADATA_PARTITIONS", "0")
    monkeypatch.setenv("AGENT_METADATA_LOG_FORMAT", "xml")
    with pytest.raises(ConfigError, match=r"AGENT_METADATA_PARTITIONS='0'.*; AGENT_METADATA_LOG_FORMAT='xml'"):
        load_settings()


@pytest.mark.parametrize("url", ["", "mysql://u:secret@host/db", "u:secret@host/db", "host=h password=secret"])
def test_wrong_database_url_is_named_without_its_value(monkeypatch, url):
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(ConfigError) as raised:
        load_settings()
    message = str(raised.value)
    assert message == "DATABASE_URL: must start with postgresql://"
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("variable", TOKENS)
@pytest.mark.parametrize("token", ["two words", "s3cret\n", "gehe\u00edm", '"s3cret"'])
def test_wrong_token_is_named_without_its_value(monkeypatch, variable, token):
    monkeypatch.setenv(variable, token)
    with pytest.raises(ConfigError) as raised:
        load_settings()
    assert str(raised.value).startswith(f"{variable}: may contain only letters")
    assert token not in str(raised.value)


def test_empty_token_is_none(monkeypatch):
    for variable in TOKENS:
        monkeypatch.setenv(variable, "")
    settings = load_settings()
    assert (settings.serve_token, settings.serve_reports_token) == (None, None)


@pytest.mark.parametrize("variable", URLS)
@pytest.mark.parametrize("parameter", ["sslrootcert", "sslcert", "sslkey"])
def test_file_that_a_database_url_names_must_be_there(monkeypatch, variable, parameter):
    monkeypatch.setenv(variable, f"postgresql://u:secret@host/db?sslmode=verify-full&{parameter}=/none.pem")
    with pytest.raises(ConfigError) as raised:
        load_settings()
    assert str(raised.value) == f"{variable}: {parameter}=/none.pem: there is no such file"


def test_wrong_setting_beside_a_good_database_url_does_not_show_the_password(monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgresql://u:secret@host/db")
    with pytest.raises(ConfigError) as raised:
        load_settings(partitions=0)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("render", [repr, str])
def test_settings_in_a_log_line_do_not_show_the_password(render):
    assert "hidden" not in render(load_settings(database_url="postgresql://u:hidden@host/db"))


@pytest.mark.parametrize("scheme", ["postgresql", "postgres"])
def test_database_url_of_either_scheme_is_taken_as_it_is(monkeypatch, scheme):
    monkeypatch.setenv("DATABASE_URL", f"{scheme}://u:p@host/db")
    assert load_settings().database_url.get_secret_value() == f"{scheme}://u:p@host/db"


def test_environment_is_read(monkeypatch):
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "a:1,[::1]:2")
    monkeypatch.setenv("AGENT_METADATA_PARTITIONS", "3")
    monkeypatch.setenv("AGENT_METADATA_WINDOW_SECONDS", "0.5")
    monkeypatch.setenv("AGENT_METADATA_UNLOGGED", "true")
    settings = load_settings()
    assert (settings.kafka_bootstrap_servers, settings.partitions) == ("a:1,[::1]:2", 3)
    assert (settings.window_seconds, settings.unlogged) == (0.5, True)


def test_unset_environment_gives_the_defaults():
    settings = load_settings()
    assert (settings.kafka_bootstrap_servers, settings.partitions, settings.window_seconds) == ("localhost:9092", 8, 5)


def test_override_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "environment:1")
    monkeypatch.setenv("AGENT_METADATA_PARTITIONS", "3")
    settings = load_settings(kafka_bootstrap_servers="override:2", partitions=4)
    assert (settings.kafka_bootstrap_servers, settings.partitions) == ("override:2", 4)


def test_override_of_none_leaves_the_environment(monkeypatch):
    monkeypatch.setenv("AGENT_METADATA_PARTITIONS", "3")
    assert load_settings(partitions=None).partitions == 3


def test_override_with_a_name_that_is_no_setting_is_refused():
    with pytest.raises(ConfigError, match="patritions is not a setting; did you mean partitions"):
        load_settings(patritions=3)


def test_one_topic_for_two_roles_is_refused(monkeypatch):
    monkeypatch.setenv("AGENT_METADATA_BATCHES_TOPIC", "agent-metadata.events.v1")
    with pytest.raises(ConfigError, match="must be three different topics"):
        load_settings()


@pytest.fixture
def config_file(monkeypatch, tmp_path):
    file = tmp_path / "settings.toml"
    monkeypatch.setenv("AGENT_METADATA_CONFIG_FILE", str(file))
    return file


def test_file_wins_over_defaults_and_the_environment_over_the_file(monkeypatch, config_file):
    config_file.write_text("partitions = 3\nwindow_seconds = 0.5\nkafka_bootstrap_servers = 'file:1'\n")
    monkeypatch.setenv("AGENT_METADATA_PARTITIONS", "4")
    settings = load_settings()
    assert (settings.partitions, settings.window_seconds, settings.kafka_bootstrap_servers) == (4, 0.5, "file:1")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("partitions = 0", "AGENT_METADATA_PARTITIONS=0: must be a whole number from 1 to 1024"),
        ("partitons = 3", "partitons is not a setting; did you mean partitions?"),
        ("partitions = ", "is not TOML"),
    ],
)
def test_wrong_file_is_refused(config_file, text, complaint):
    config_file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_settings()
    assert complaint in str(refused.value)


def test_missing_file_is_refused(config_file):
    with pytest.raises(ConfigError, match="there is no such file"):
        load_settings()


def test_unknown_variable_is_refused_with_the_nearest_known_one(monkeypatch):
    monkeypatch.setenv("AGENT_METADATA_WINDOW_SECONDS_", "1")
    with pytest.raises(ConfigError, match="is not a setting; did you mean AGENT_METADATA_WINDOW_SECONDS"):
        load_settings()


def test_description_names_origins_and_masks_secrets(monkeypatch, config_file):
    config_file.write_text("partitions = 3\n")
    monkeypatch.setenv("DATABASE_URL", "postgresql://user:secret@db/metadata")
    described = {variable: rest for variable, *rest in describe_settings(load_settings())}
    assert described["AGENT_METADATA_PARTITIONS"] == ["3", str(config_file)]
    assert described["AGENT_METADATA_BATCH_SIZE"] == ["500", "default"]
    assert described["DATABASE_URL"] == ["**********", "environment"]
