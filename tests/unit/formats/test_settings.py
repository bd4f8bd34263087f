"""The settings of the events topic's format: what is wrong in a table is named with its field."""

import json

import pytest

from pipeline.errors import ConfigError
from pipeline.settings import describe_settings, load_settings

GOOD = {"id": "device", "entries": "readings"}


@pytest.fixture
def config_file(monkeypatch, tmp_path):
    for name in ("EVENTS_FORMAT", "MAPPING", "OTLP"):
        monkeypatch.delenv(f"AGENT_METADATA_{name}", raising=False)
    file = tmp_path / "settings.toml"
    file.write_text("")
    monkeypatch.setenv("AGENT_METADATA_CONFIG_FILE", str(file))
    return file


def test_tables_are_read_from_the_file_and_json_from_the_environment_wins(config_file, monkeypatch):
    config_file.write_text('[mapping]\nid = ["site", "device"]\nentries = \'data."read.ings"\'\nexclude = ["x"]\n')
    settings = load_settings()
    assert settings.mapping.id == ["site", "device"]
    assert [path.steps for path in settings.mapping.id_paths] == [("site",), ("device",)]
    assert settings.mapping.path("entries").steps == ("data", "read.ings")
    monkeypatch.setenv("AGENT_METADATA_MAPPING", json.dumps(GOOD))
    settings = load_settings()
    assert settings.mapping.id == "device"
    described = {variable: rest for variable, *rest in describe_settings(settings)}
    assert described["AGENT_METADATA_MAPPING"] == ['{"id":"device","entries":"readings"}', "environment"]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[mapping]\nentries = 'e'", "mapping.id is missing"),
        ("[mapping]\nid = 7\nentries = 'e'", "mapping.id = 7: must be a path, or a list of paths"),
        ("[mapping]\nid = ['a', 'b..c']\nentries = 'e'", "mapping.id = ['a', 'b..c']: is not a path"),
        (
            "[mapping]\nid = 'a'\nentries = 'e'\nvalues = 'v'",
            "mapping.values is not a setting; those of [mapping]",
        ),
        ("[mapping]\nid = 'a'\nentries = 'e'\nkey = 'k'", "AGENT_METADATA_MAPPING: key without value"),
        ("mapping = 'x'", "AGENT_METADATA_MAPPING='x': must be a table"),
        ("mapping = 3", "AGENT_METADATA_MAPPING=3: must be a table"),
        ("[otlp]\nid = ['host.name']", "otlp needs AGENT_METADATA_EVENTS_FORMAT=otlp_json or otlp_proto"),
        ("events_format = 'otlp'", "AGENT_METADATA_EVENTS_FORMAT='otlp': input should be 'json', 'otlp_json' or"),
        (
            "events_format = 'otlp_json'\n[mapping]\nid = 'a'\nentries = 'e'",
            "mapping is for AGENT_METADATA_EVENTS_FORMAT=json, and it is otlp_json",
        ),
        ("events_format = 'otlp_json'\n[otlp]\nid = []", "otlp.id = []: list should have at least 1 item"),
        (
            "events_format = 'otlp_json'\n[otlp]\ninclude = ['a']\nexclude = ['b']",
            "AGENT_METADATA_OTLP: include and exclude exclude each other",
        ),
    ],
)
def test_wrong_table_is_refused_with_its_field(config_file, text, complaint):
    config_file.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_settings()
    assert complaint in str(refused.value)
