"""What `topics create` asks for on a cluster of some size, and what `topics diff` and `status` say of what is there."""

import pytest

from pipeline.errors import ConfigError
from pipeline.kafka import topics
from pipeline.kafka.admin import Cluster
from pipeline.settings import load_settings

MIN_INSYNC = "min.insync.replicas"
BROKERS_DEFAULT = -1
KAFKA = {}


class StubAdmin:
    """A cluster's admin: `held` has (replication factor, min.insync.replicas) of the topics that exist, by role."""

    def __init__(self, brokers, specs=None, held=None, configs_error=None, is_embedded=False):
        specs = {spec.name: (spec, *held[role]) for role, spec in (specs or {}).items() if role in (held or {})}
        self._cluster = Cluster(
            {name: spec.partitions for name, (spec, *_) in specs.items()},
            {name: factor for name, (_, factor, _) in specs.items()},
            brokers,
            is_embedded,
        )
        self._configs = {name: {**spec.config, MIN_INSYNC: str(least)} for name, (spec, _, least) in specs.items()}
        self._configs_error = configs_error
        self.created = []

    def __call__(self, _config):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def cluster(self, _timeout_s):
        return self._cluster

    def configs(self, names, _timeout_s):
        if self._configs_error:
            raise self._configs_error
        return {name: self._configs[name] for name in names}

    def create(self, new, _timeout_s):
        self.created += new
        return [topic.topic for topic in new]

    def wait_until_shown(self, _names, _timeout_s):
        pass


@pytest.fixture
def specs():
    return load_settings().declared_topics()


@pytest.fixture
def stub(monkeypatch):
    def use(*arguments, **named):
        admin = StubAdmin(*arguments, **named)
        monkeypatch.setattr(topics, "KafkaAdmin", admin)
        return admin

    return use


def held(factor, min_insync, **others):
    return {role: others.get(role, (factor, min_insync)) for role in ("events", "batches", "dead_letter")}


def declared(**replication):
    return load_settings(**{f"topic_{name}": value for name, value in replication.items()}).declared_topics()


@pytest.mark.parametrize(
    ("brokers", "replication", "factor", "min_insync"),
    [
        (1, {}, BROKERS_DEFAULT, None),
        (2, {}, BROKERS_DEFAULT, None),
        (3, {}, 3, "2"),
        (7, {}, 3, "2"),
        (3, {"replication": 1}, 1, None),
        (3, {"replication": 2}, 2, None),
        (3, {"replication": 3, "min_insync_replicas": 1}, 3, "1"),
        (5, {"replication": 5, "min_insync_replicas": 3}, 5, "3"),
        (3, {"min_insync_replicas": 3}, 3, "3"),
        (1, {"min_insync_replicas": 1}, BROKERS_DEFAULT, "1"),
        (2, {"replication": 2, "min_insync_replicas": 2}, 2, "2"),
    ],
)
def test_topic_is_created_with_the_replication_that_fits(stub, brokers, replication, factor, min_insync):
    admin = stub(brokers)
    topics.create_topics(KAFKA, declared(**replication))
    assert len(admin.created) == 3
    assert {topic.replication_factor for topic in admin.created} == {factor}
    assert {topic.config.get(MIN_INSYNC) for topic in admin.created} == {min_insync}


def test_min_insync_that_may_exceed_the_brokers_default_is_refused(stub):
    admin = stub(2)
    with pytest.raises(ConfigError, match="set AGENT_METADATA_TOPIC_REPLICATION too"):
        topics.create_topics(KAFKA, declared(min_insync_replicas=2))
    assert admin.created == []


@pytest.mark.parametrize(
    "replication", [{"replication": 2, "min_insync_replicas": 3}, {"replication": "auto", "min_insync_replicas": 4}]
)
def test_min_insync_above_the_replication_is_refused_at_the_start(replication):
    with pytest.raises(ConfigError, match=r"REPLICAS=[34] is more than .* \((2|auto, at most 3)\)"):
        declared(**replication)


def test_file_may_say_it_in_a_number(monkeypatch, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("topic_replication = 5\n")
    monkeypatch.setenv("AGENT_METADATA_CONFIG_FILE", str(file))
    assert {spec.replication.factor for spec in load_settings().declared_topics().values()} == {5}


@pytest.mark.parametrize(
    ("brokers", "replication", "actual", "found"),
    [
        (1, {}, (1, 1), []),
        (2, {}, (2, 1), []),
        (2, {}, (1, 1), [("replication", "2 or more (auto)", "1")]),
        (3, {}, (3, 2), []),
        (5, {}, (5, 3), []),
        (3, {}, (1, 1), [("replication", "3 or more (auto)", "1"), (MIN_INSYNC, "2 or more (auto)", "1")]),
        (3, {}, (3, 1), [(MIN_INSYNC, "2 or more (auto)", "1")]),
        (3, {"replication": 1}, (1, 1), []),
        (3, {"replication": 2}, (3, 2), [("replication", "2", "3")]),
        (3, {"min_insync_replicas": 1}, (3, 1), []),
        (3, {"min_insync_replicas": 3}, (3, 2), [(MIN_INSYNC, "3", "2")]),
    ],
)
def test_diff_names_what_is_less_than_auto_or_not_what_is_set(stub, brokers, replication, actual, found):
    specs = declared(**replication)
    stub(brokers, specs, held(3, 2, events=actual) if brokers > 2 and not replication else held(*actual))
    differences = topics.diff_topics(KAFKA, specs)
    events = [(item.field, item.declared, item.actual) for item in differences if item.topic == specs["events"].name]
    assert events == found


@pytest.mark.parametrize(
    ("brokers", "actual", "said"),
    [
        (2, (1, 1), "{} is lost with one broker, as its replication factor is 1: raise it to 2"),
        (3, (1, 1), "{} is lost with one broker, as its replication factor is 1: raise it to 3"),
        (3, (3, 1), "{} may lose acknowledged records with one broker, as its min.insync.replicas is 1"),
        (3, (2, 1), "{} may lose acknowledged records with one broker, as its min.insync.replicas is 1"),
    ],
)
def test_topic_that_one_lost_broker_would_cost_records_is_a_problem(stub, specs, brokers, actual, said):
    stub(brokers, specs, held(3, 2, batches=actual))
    (risk,) = topics.find_risks(KAFKA, specs)
    assert risk.is_problem
    assert risk.text.startswith(said.format(specs["batches"].name))


@pytest.mark.parametrize(("brokers", "actual"), [(3, (3, 2)), (2, (2, 1)), (4, (2, 2))])
def test_topics_that_survive_a_broker_are_no_risk(stub, specs, brokers, actual):
    stub(brokers, specs, held(*actual))
    assert topics.find_risks(KAFKA, specs) == []


@pytest.mark.parametrize("replication", [{"replication": 1}, {"min_insync_replicas": 1}])
def test_risk_that_the_settings_ask_for_is_a_note(stub, replication):
    specs = declared(**replication)
    stub(3, specs, held(replication.get("replication", 3), 1))
    risks = topics.find_risks(KAFKA, specs)
    assert [risk.is_problem for risk in risks] == [False] * 3


def test_cluster_of_one_broker_is_noted_once(stub, specs):
    stub(1, specs, held(1, 1))
    (risk,) = topics.find_risks(KAFKA, specs)
    assert (risk.is_problem, risk.text.partition(":")[0]) == (False, "Kafka has one broker")


def test_embedded_broker_is_not_judged(stub, specs):
    stub(1, specs, held(1, 1), is_embedded=True)
    assert topics.find_risks(KAFKA, specs) == []


def test_without_the_right_to_read_configs_replication_is_still_judged(stub, specs):
    refused = topics.ServiceUnavailable("Kafka answered: Topic authorization failed")
    stub(3, specs, held(3, 1, events=(1, 1)), configs_error=refused)
    note, problem = topics.find_risks(KAFKA, specs)
    assert not note.is_problem
    assert "Topic authorization failed" in note.text
    assert problem.is_problem
    assert problem.text.startswith(specs["events"].name)
