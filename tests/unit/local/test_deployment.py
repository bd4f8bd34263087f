"""A private pipeline's names and configuration, without services."""

import pytest

from pipeline.errors import ConfigError
from pipeline.local.deployment import Deployment

URL = "postgresql://u@host/d"


def test_settings_and_environment_of_its_processes_agree(tmp_path):
    deployment = Deployment("host:1", URL, tmp_path, window_seconds=2, unlogged=True)
    assert deployment.environment["AGENT_METADATA_WINDOW_SECONDS"] == "2"
    assert deployment.environment["KAFKA_BOOTSTRAP_SERVERS"] == deployment.settings.kafka_bootstrap_servers == "host:1"
    assert deployment.environment["DATABASE_URL"] == URL
    assert (deployment.settings.window_seconds, deployment.settings.unlogged) == (2, True)


def test_two_pipelines_share_no_topic_and_no_group(tmp_path):
    one, two = (Deployment("host:1", URL, tmp_path).settings for _ in range(2))
    assert not set(one.topic_names.values()) & set(two.topic_names.values())
    assert one.consumer_group != two.consumer_group


def test_its_settings_go_over_those_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", "elsewhere:1")
    monkeypatch.setenv("AGENT_METADATA_WINDOW_SECONDS", "9")
    monkeypatch.setenv("AGENT_METADATA_PARTITIONS", "3")
    settings = Deployment("host:1", URL, tmp_path, window_seconds=2).settings
    assert (settings.kafka_bootstrap_servers, settings.window_seconds, settings.partitions) == ("host:1", 2, 3)


@pytest.mark.parametrize(
    ("url", "expected"), [(URL, f"{URL}?search_path=demo1"), (f"{URL}?sslmode=require", None)], ids=["plain", "query"]
)
def test_own_schema_is_the_search_path_of_its_url(tmp_path, url, expected):
    deployment = Deployment("host:1", url, tmp_path, run_id="demo1", own_schema=True)
    found = deployment.settings.database_url.get_secret_value()
    assert found == (expected or f"{url}&search_path=demo1")


def test_wrong_setting_is_refused_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="AGENT_METADATA_WINDOW_SECONDS"):
        Deployment("host:1", URL, tmp_path, window_seconds=0)


def test_role_writes_to_files_of_its_own_and_tells_its_end(tmp_path):
    deployment = Deployment("host:1", URL, tmp_path)
    role = deployment.start("config", "--json")
    try:
        assert role.wait(60) == 0, deployment.log(role)
        assert '"value": "host:1"' in role.output_path.read_text()
        assert (role.role, deployment.log(role)) == ("config", "")
    finally:
        deployment.close()
