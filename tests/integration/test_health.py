"""/metrics, /live and /ready of worker and sink."""

import uuid
from datetime import UTC, datetime
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pipeline.local import PackagedPostgres
from pipeline.local.process import free_port
from tests.deployment import Deployment, eventually

pytestmark = pytest.mark.services


def ask(port, path):
    try:
        with urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()
    except OSError:
        return 0, ""


@pytest.mark.parametrize("role", ["worker", "sink"])
async def test_role_is_ready_once_it_owns_partitions_and_its_metrics_parse(deploy, role):
    port = free_port()
    pipeline = await deploy(metrics_port=port)
    await pipeline.started(role)
    await eventually("it is ready", lambda: ask(port, "/ready")[0] == 200)
    assert ask(port, "/live") == (200, "ok\n")
    status, text = ask(port, "/metrics")
    assert status == 200
    assert any(family.name.startswith("agent_metadata_") for family in text_string_to_metric_families(text))
    assert ask(port, "/elsewhere")[0] == 404


async def test_sink_holds_batches_back_and_is_not_ready_while_postgres_is_away(bootstrap_servers, tmp_path):
    port = free_port()
    with PackagedPostgres() as postgres:
        pipeline = Deployment(bootstrap_servers, postgres.database_url, tmp_path, window_seconds=0.1)
        await pipeline.prepare()
        try:
            await pipeline.started("worker")
            pipeline.environment["AGENT_METADATA_METRICS_PORT"] = str(port)
            await pipeline.started("sink")
            report(pipeline, "before")
            await eventually("the row is there", lambda: value_is(pipeline, "before"))
            postgres.stop()
            report(pipeline, "while it was away")
            held = (503, "Postgres is away; batches are held back\n")
            await eventually("the sink holds back", lambda: ask(port, "/ready") == held)
            assert ask(port, "/live")[0] == 200
            postgres.start()
            await eventually("the row is right", lambda: value_is(pipeline, "while it was away"))
            assert ask(port, "/ready")[0] == 200
        finally:
            pipeline.close()


def report(pipeline, value):
    with pipeline.producer() as producer:
        assert producer.add(uuid.UUID(int=1), ["k"], [value], [""], datetime.now(UTC))


async def value_is(pipeline, value):
    return [row[0] for row in (await pipeline.table()).values()] == [value]
