"""Today's version beside the previous one, process by process, and on what the previous one created."""

import asyncio
import uuid
from datetime import UTC, datetime

import pytest

from tests.support.deployment import Deployment, consume_all, eventually
from tests.support.previous_version import MODULE

pytestmark = pytest.mark.services

TODAY = ("pipeline",)
AGENTS = [uuid.uuid5(uuid.NAMESPACE_OID, str(number)) for number in range(40)]


class Pipeline(Deployment):
    """A pipeline whose topics and tables the previous version made."""

    async def prepare(self):
        for command in (("topics", "create"), ("db", "migrate")):
            await self.run(*command, module=MODULE)

    async def run(self, *command, module):
        process = self.start(*command, module=module)
        await eventually(f"{command} ends", lambda: process.poll() is not None)
        assert process.returncode == 0, self.log(process)

    async def join(self, role, module):
        process = self.start(role, module=module)
        await eventually(f"{role} owns partitions", lambda: self.logged(process, "partitions_assigned"))
        return process

    def report(self, number, expected):
        with self.producer() as producer:
            now = datetime.now(UTC)
            for agent_id in AGENTS:
                assert producer.add(agent_id, ["cpu", "mem"], [f"{number}%", "1 GB"], ["", "slow"], now)
                expected[str(agent_id), "cpu"] = (f"{number}%", "", now)
                expected[str(agent_id), "mem"] = ("1 GB", "slow", now)


@pytest.fixture
async def pipeline(bootstrap_servers, database_url, tmp_path):
    pipeline = Pipeline(bootstrap_servers, database_url, tmp_path)
    await pipeline.prepare()
    yield pipeline
    assert consume_all(pipeline.settings, pipeline.settings.dead_letter_topic) == []
    pipeline.close()


@pytest.mark.parametrize(
    ("worker", "sink"), [(MODULE, TODAY), (TODAY, MODULE)], ids=["previous worker", "previous sink"]
)
async def test_worker_and_sink_of_neighbouring_versions_work_together(pipeline, worker, sink):
    if worker == MODULE:  # else the sink's tables are those that it knows
        await pipeline.run("db", "migrate", module=TODAY)
    processes = [await pipeline.join("worker", worker), await pipeline.join("sink", sink)]
    expected = {}
    for number in range(5):
        pipeline.report(number, expected)
        await pipeline.wait_for(expected)
    for process in processes:
        assert pipeline.stop(process) == 0


async def test_migration_under_a_sink_of_the_previous_version_disturbs_nothing(pipeline):
    await pipeline.join("worker", MODULE)
    sink = await pipeline.join("sink", MODULE)
    expected = {}
    pipeline.report(1, expected)
    await pipeline.wait_for(expected)
    migrating = asyncio.create_task(pipeline.run("db", "migrate", module=TODAY))
    pipeline.report(2, expected)
    await migrating
    pipeline.report(3, expected)
    await pipeline.wait_for(expected)
    assert pipeline.stop(sink) == 0
    await pipeline.join("sink", MODULE)  # starts on today's tables, as in a rollback
    pipeline.report(4, expected)
    await pipeline.wait_for(expected)


async def test_sink_that_was_upgraded_or_rolled_back_goes_on_where_the_other_stopped(pipeline):
    await pipeline.run("db", "migrate", module=TODAY)
    await pipeline.join("worker", MODULE)
    expected = {}
    for number, version in enumerate((MODULE, TODAY, MODULE)):
        sink = await pipeline.join("sink", version)
        pipeline.report(number, expected)
        await pipeline.wait_for(expected)
        assert pipeline.stop(sink) == 0
        pipeline.report(number + 100, expected)  # for the next one
