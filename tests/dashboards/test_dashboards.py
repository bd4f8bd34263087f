"""The Grafana dashboard and the alert rules: what they name is exported, and promtool accepts them."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import get_args

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from pipeline.monitoring.metrics import Hop, ListenerMetrics, ServeMetrics, SinkMetrics, WorkerMetrics
from tests.conftest import unavailable

DASHBOARDS = Path(__file__).parents[2] / "dashboards"
# The suffixes of a type's samples.
SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}


def dashboard():
    return json.loads((DASHBOARDS / "grafana" / "agent-metadata.json").read_text(encoding="utf-8"))


def expressions():
    """(panel or alert, PromQL) of every query and rule."""
    for panel in dashboard()["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"].replace("$__rate_interval", "1m")
    rules = (DASHBOARDS / "rules.yml").read_text(encoding="utf-8")
    for alert, rule in zip(re.findall(r"alert: (\w+)", rules), re.split(r"- alert: ", rules)[1:], strict=True):
        yield alert, rule.split("expr:", 1)[1].split("labels:", 1)[0].split("for:", 1)[0].removeprefix(" |").strip()


def exported():
    names = set()
    for make in (WorkerMetrics, SinkMetrics, ListenerMetrics, ServeMetrics):
        registry = CollectorRegistry()
        _kept = make(registry)
        names |= {metric.name + suffix for metric in registry.collect() for suffix in SUFFIXES[metric.type]}
    return names


@pytest.mark.parametrize(("place", "expression"), list(expressions()))
def test_metrics_that_are_named_are_exported(place, expression):
    named = set(re.findall(r"agent_metadata_\w+", expression))
    assert named or expression.startswith("up{"), place
    assert named <= exported()


def test_hops_have_names_that_freshness_knows():
    text = " ".join(expression for _, expression in expressions())
    assert set(re.findall(r'hop="(\w+)"', text)) <= set(get_args(Hop))


def test_panels_have_places_and_ids_of_their_own_and_the_provisioned_source():
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    source = (DASHBOARDS / "grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8")
    for panel in panels:
        assert f"uid: {panel['datasource']['uid']}\n" in source
        assert panel["description"]


@pytest.fixture
def promtool():
    if shutil.which("promtool") is None:
        unavailable("promtool is not installed", required_by="PIPELINE_REQUIRE_PROMTOOL")

    def run(*arguments):
        done = subprocess.run(["promtool", *arguments], cwd=DASHBOARDS, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_prometheus_takes_its_configuration_and_the_rules(promtool):
    promtool("check", "config", "prometheus.yml")


def test_alerts_fire_when_they_should_and_only_then(promtool):
    promtool("test", "rules", "rules_test.yml")


def test_every_alert_has_a_test():
    alerts = set(re.findall(r"alert: (\w+)", (DASHBOARDS / "rules.yml").read_text(encoding="utf-8")))
    assert alerts == set(re.findall(r"alertname: (\w+)", (DASHBOARDS / "rules_test.yml").read_text(encoding="utf-8")))


def test_queries_of_the_dashboard_are_promql(promtool, tmp_path):
    rules = [{"record": f"query_{number}", "expr": promql} for number, (_, promql) in enumerate(expressions())]
    file = tmp_path / "queries.json"  # JSON is YAML
    file.write_bytes(msgspec.json.encode({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", str(file))
