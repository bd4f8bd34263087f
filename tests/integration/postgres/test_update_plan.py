"""The bulk writes keep their plan: a nested loop over the primary key, however many rows a statement has."""

import json
import uuid

import asyncpg
import pytest

from pipeline.postgres.migrations import migrate
from pipeline.postgres.statements import statement

pytestmark = pytest.mark.services


def nodes(plan):
    yield plan["Node Type"], plan.get("Index Name")
    for child in plan.get("Plans", ()):
        yield from nodes(child)


@pytest.mark.parametrize("is_analyzed", [False, True])
@pytest.mark.parametrize("rows_per_statement", [1, 1000, 5000])
@pytest.mark.parametrize("name", ["update_rows", "insert_rows", "insert_names", "replay_rows", "replay_count"])
async def test_write_uses_the_primary_key_only(database_url, name, rows_per_statement, is_analyzed):
    connection = await asyncpg.connect(database_url)
    await migrate(connection)
    await connection.execute(
        "insert into workspace_agent_metadata (workspace_agent_id, key) "
        "select md5(n::text)::uuid, 'k' || m from generate_series(1, 2000) n, generate_series(1, 10) m"
    )
    if is_analyzed:
        await connection.execute("analyze workspace_agent_metadata")
    agents = [uuid.uuid4() for _ in range(rows_per_statement)]
    texts = ["k"] * rows_per_statement
    times = [0] * rows_per_statement
    arguments = {
        "insert_names": [agents, texts],
        "replay_rows": [agents, texts, texts, texts, times, True],
        "replay_count": [agents, texts, times, True],
    }.get(name, [agents, texts, texts, texts, times])
    async with connection.transaction():
        await connection.execute(statement("begin_write"), "60000")
        explained = await connection.fetchval("explain (format json) " + statement(name), *arguments)
    await connection.close()
    plan = dict(nodes(json.loads(explained)[0]["Plan"]))
    assert "workspace_agent_metadata_pkey" in (plan.get("Index Scan"), plan.get("Index Only Scan"))
    assert not {"Hash Join", "Merge Join", "Seq Scan"} & set(plan)
