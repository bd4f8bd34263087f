"""From the topic to the table: `agent-metadata run` against a plain single-process program, on the same entries.

Both clocks start when the partitions are assigned and end when every row of the table is right. The plain program
consumes into a dict and, every second, writes it with the statement of sql/update_rows.sql over asyncpg, a thousand
rows at a time, and then commits its offsets. Ours runs worker and sink as two processes with a window of 1 s.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncpg

from bench import harness
from bench.plain import Newest, assigned_consumer, fold
from pipeline.core.report import timestamp_us
from pipeline.local import start_services
from pipeline.local.deployment import Deployment
from pipeline.postgres.migrations import migrate
from pipeline.postgres.statements import statement
from pipeline.postgres.store import ROWS_PER_STATEMENT

ENTRIES = 1_000_000
RUNS = 5


def plain(servers: str, url: str, topic: str, **_: Any) -> None:
    """Consume until stopped, writing every second."""

    async def write(connection: Any, newest: Newest) -> None:
        rows = [(*pair, value, error, timestamp_us(at)) for pair, (at, value, error) in newest.items()]
        for start in range(0, len(rows), ROWS_PER_STATEMENT):
            columns = zip(*rows[start : start + ROWS_PER_STATEMENT], strict=True)
            await connection.fetchrow(statement("update_rows"), *map(list, columns))

    async def main() -> None:
        off = {f"enable_{way}": "off" for way in ("hashjoin", "mergejoin", "seqscan", "bitmapscan")}
        connection = await asyncpg.connect(url, server_settings=off)
        consumer, started = assigned_consumer(servers, topic)
        newest: Newest = {}
        due = None
        while True:
            fold(consumer.consume(5000, 0.1), newest)
            if started and due is None:
                print(json.dumps({"event": "partitions_assigned"}), file=sys.stderr, flush=True)
                due = time.perf_counter() + 1
            if due is not None and newest and time.perf_counter() >= due:
                await write(connection, newest)
                consumer.commit(asynchronous=False)
                newest = {}
                due = time.perf_counter() + 1

    asyncio.run(main())


def measure(command: Sequence[str], environment: Mapping[str, str], url: str) -> float:
    """Return the seconds from the assignment until the table is right."""
    asyncio.run(reset(url))
    process = subprocess.Popen(
        command, env={**os.environ, **environment, "PYTHONWARNINGS": "ignore"}, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        event = json.loads(line)
        if event["event"] == "partitions_assigned" and event.get("topic", "events").startswith("events"):
            break
    started = time.perf_counter()
    asyncio.run(wait_until_right(url))
    seconds = time.perf_counter() - started
    process.terminate()
    process.communicate()
    return seconds


async def expect(url: str, newest: dict[tuple[str, str], Any]) -> None:
    """Note what the table must hold, and make all rows exist."""
    connection = await asyncpg.connect(url)
    await migrate(connection)
    await connection.execute("drop table if exists expected")
    await connection.execute(
        "create table expected "
        "(agent_id uuid, key text, value text, collected_at timestamptz, primary key (agent_id, key))"
    )
    await connection.copy_records_to_table(
        "expected", records=[(uuid.UUID(agent), key, *rest) for (agent, key), rest in newest.items()]
    )
    await connection.execute("truncate workspace_agent_metadata")
    await connection.execute(
        "insert into workspace_agent_metadata (workspace_agent_id, key) "
        "select agent_id, key from expected order by 1, 2"
    )
    await connection.execute("vacuum analyze workspace_agent_metadata, expected")
    await connection.close()


async def reset(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("update workspace_agent_metadata set value = '', collected_at = default")
    await connection.execute("vacuum workspace_agent_metadata")
    await connection.execute("checkpoint")
    await connection.close()


async def wait_until_right(url: str) -> None:
    """Look at a few rows often, and at all of them once these are right: watching must not use up a core."""
    connection = await asyncpg.connect(url)
    wrong = (
        "select count(*) from {} as e left join workspace_agent_metadata as m on m.workspace_agent_id = e.agent_id "
        "and m.key = e.key where (m.value, m.collected_at) is distinct from (e.value, e.collected_at)"
    )
    few = wrong.format("(select * from expected where agent_id in (select agent_id from expected limit 200))")
    while await connection.fetchval(few) or await connection.fetchval(wrong.format("expected")):
        await asyncio.sleep(0.02)
    await connection.close()


def main() -> None:
    figures: dict[str, list[float]] = {}
    ratios = {}
    with start_services(say=harness.say) as services, tempfile.TemporaryDirectory() as folder:
        servers, url = services.bootstrap_servers, services.database_url
        harness.create_topic(servers, "dead", 1)
        for shape in (10, 1):
            topic = f"events-{shape}"
            harness.say(f"producing {ENTRIES:,} entries, {shape} per report")
            newest = harness.fill_events(servers, topic, entries=ENTRIES, entries_a_report=shape)
            asyncio.run(expect(url, newest))
            options = json.dumps({"servers": servers, "url": url, "topic": topic})
            plain_command = [sys.executable, "-m", "bench.end_to_end", "plain", options]

            def ours(topic: str = topic) -> float:
                deployment = Deployment(
                    servers,
                    url,
                    Path(folder),
                    events_topic=topic,
                    dead_letter_topic="dead",
                    window_seconds=1,
                    log_format="json",
                )
                harness.create_topic(servers, deployment.settings.batches_topic)
                asyncio.run(forget_progress(url))
                return ENTRIES / measure(deployment.command("run"), deployment.environment, url)

            measured = harness.in_turn(
                {
                    f"plain_{shape}": lambda command=plain_command: ENTRIES / measure(command, {}, url),
                    f"ours_{shape}": ours,
                },
                RUNS,
            )
            figures.update(measured)
            ratios[f"end_to_end_vs_plain_program_{shape}"] = harness.ratio(measured, f"ours_{shape}", f"plain_{shape}")
        harness.report(
            "end_to_end",
            unit="entries a second until the table is right",
            services=f"{services.broker}; {services.database}",
            figures=figures,
            ratios=ratios,
            note=__doc__ or "",
        )


async def forget_progress(url: str) -> None:
    """Make the same source offsets count again: each run reads them from the start."""
    connection = await asyncpg.connect(url)
    await connection.execute("truncate agent_metadata_progress")
    await connection.close()


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        plain(**json.loads(sys.argv[2]))
