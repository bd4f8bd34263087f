"""The replay against a plain consumer loop, what it does to live reports, and how long a refill takes.

The plain loop consumes, decodes and keeps the latest (bench/plain.py); ours is `agent-metadata replay`, which finds its
range, folds by the worker's rules and writes the rows, on the same entries: BENCH_ENTRIES (10,000,000), ten per
report, and a fifth as many, one per report.
Freshness is the time from a report to its row's NOTIFY, of 500 live reports a second in windows of 1 s, without and
with replays of all entries running; no row may move back meanwhile, and each must be right in the end. The refill
writes 1,000,000 pairs into an empty table; the sink's own refill is timed from the kill -9 of a backend, which empties
an UNLOGGED table, until all are back, with Postgres's own recovery.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
from confluent_kafka import Producer

from bench import harness, worker
from bench.end_to_end import expect, wait_until_right
from pipeline.core.batch import Batch, Source, WindowSpan, encode_batch
from pipeline.local import start_services
from pipeline.local.simulate import agent_id
from pipeline.postgres.migrations import migrate

ENTRIES = int(os.environ.get("BENCH_ENTRIES", "10000000"))
SHAPES = {1: ENTRIES // 5, 10: ENTRIES}  # by entries per report; the last one's topic is the live pipeline's too
RUNS = 3
LIVE_AGENTS, WATCHED, LIVE_SECONDS = 500, 20, 30.0
REFILL_AGENTS, REFILL_KEYS, BATCH_SIZE = 100_000, 10, 500
WHOLE = REFILL_AGENTS * REFILL_KEYS

NOTE_MOVES_BACK = """
create table moved_back (agent_id uuid, key text);
create function note_move_back() returns trigger language plpgsql as $$
begin
    insert into moved_back values (new.workspace_agent_id, new.key);
    return new;
end $$;
create trigger note_move_back before update on workspace_agent_metadata
    for each row when (new.collected_at < old.collected_at) execute function note_move_back();
"""


def plain(**options: Any) -> None:
    """The loop at the replay's own niceness, so that both get the same share of the machine."""
    os.nice(10)
    worker.plain(**options)


def command(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *arguments, "--json"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        check=True,
    )
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def start(environment: dict[str, str], *arguments: str, **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", *arguments], env={**os.environ, **environment}, text=True, **options
    )


async def empty(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("delete from workspace_agent_metadata")
    await connection.execute("vacuum workspace_agent_metadata")
    await connection.close()


def replayed(environment: dict[str, str], url: str) -> float:
    asyncio.run(empty(url))
    dry = command(environment, "replay", "--from", "1d ago", "--dry-run")
    done = command(environment, "replay", "--from", "1d ago")
    differing = {name for name in done if done[name] != dry[name]} - {"dry_run", "from", "seconds"}
    assert not differing, (dry, done)
    assert done["changed"] == harness.AGENTS * harness.KEYS
    asyncio.run(wait_until_right(url))
    return float(done["entries"] / done["seconds"])


def freshness(environment: dict[str, str], while_running: Any) -> list[float]:
    """Return the seconds from report to NOTIFY that a listener sees for as long as `while_running()` takes."""
    watched = [str(agent_id(number)) for number in range(1, WATCHED + 1)]
    with tempfile.TemporaryFile("w+") as lines:  # a pipe would fill up
        watching = start(environment, "watch", *watched, "--json", stdout=lines)
        try:
            while_running()
        finally:
            watching.terminate()
            watching.wait()
        lines.seek(0)
        changes = [json.loads(line) for line in lines if line.endswith("}\n")]
    notified = [change for change in changes if change["notified_at"] is not None]
    return [change["notified_at"] - datetime.fromisoformat(change["collected_at"]).timestamp() for change in notified]


def live(environment: dict[str, str], url: str) -> dict[str, list[float]]:
    asyncio.run(note_moves_back(url))
    running = start({**environment, "AGENT_METADATA_WINDOW_SECONDS": "1"}, "run", stderr=subprocess.DEVNULL)
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as oracle:
        load = start(
            environment,
            *("produce", "--agents", str(LIVE_AGENTS), "--interval", "1", "--duration", "3600"),
            *("--oracle", oracle.name),
            stdout=subprocess.DEVNULL,
        )
        try:
            deadline = time.monotonic() + 600
            while json.loads(status(environment))["problems"]:  # until the backlog is folded and applied
                assert time.monotonic() < deadline
                time.sleep(1)

            def replays() -> None:
                end = time.monotonic() + LIVE_SECONDS
                while time.monotonic() < end:
                    command(environment, "replay", "--from", "1d ago")

            seconds = {
                "live_alone": freshness(environment, lambda: time.sleep(LIVE_SECONDS)),
                "live_beside_replays": freshness(environment, replays),
            }
            load.terminate()
            load.wait()
            asyncio.run(require_right(url, [json.loads(line) for line in Path(oracle.name).read_text().splitlines()]))
        finally:
            for process in (load, running):
                process.terminate()
                process.wait()
    return seconds


async def note_moves_back(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(NOTE_MOVES_BACK)
    await connection.close()


async def require_right(url: str, lines: list[list[str]]) -> None:
    """Wait until the table is as the replayed topic and the live oracle say; no row may have moved back."""
    connection = await asyncpg.connect(url)
    rows = [(uuid.UUID(agent), key, value, datetime.fromisoformat(at)) for agent, key, value, _, at in lines]
    assert len(rows) >= LIVE_AGENTS
    await connection.copy_records_to_table("expected", records=rows)
    await asyncio.wait_for(wait_until_right(url), 60)
    assert await connection.fetchval("select count(*) from moved_back") == 0
    await connection.close()


def status(environment: dict[str, str]) -> str:
    arguments = [sys.executable, "-m", "pipeline", "status", "--json", "--max-lag", "3"]
    return subprocess.run(arguments, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True).stdout


def fill_batches(servers: str, topic: str) -> None:
    harness.create_topic(servers, topic)
    producer = Producer({"bootstrap.servers": servers, "compression.type": "lz4", "linger.ms": 20})
    us = round(time.time() * 1e6)
    agents = harness.agent_ids(REFILL_AGENTS)
    for partition in range(harness.PARTITIONS):
        own = sorted(agents[partition :: harness.PARTITIONS])
        pairs = [(agent, f"key{key:02}") for agent in own for key in range(REFILL_KEYS)]
        for number, first in enumerate(range(0, len(pairs), BATCH_SIZE)):
            part = pairs[first : first + BATCH_SIZE]
            columns = [[pair[0] for pair in part], [pair[1] for pair in part], ["12.3%"] * len(part)]
            source = Source("events", "events", partition, number, number)
            batch = Batch(source, WindowSpan(0, 1), "scheduled", 1, 1, *columns, [""] * len(part), [us] * len(part))
            producer.produce(topic, encode_batch(batch), partition=partition)
        producer.flush()


def refilled(environment: dict[str, str], url: str) -> float:
    asyncio.run(truncate(url))
    done = command(environment, "refill")
    assert done["changed"] == WHOLE
    return float(done["seconds"])


def healed(environment: dict[str, str], url: str) -> float:
    """Have a sink fill an UNLOGGED table, crash Postgres, and return the seconds until the table is whole again."""
    sink = start(environment, "sink", stderr=subprocess.DEVNULL)
    try:
        asyncio.run(wait_until_whole(url))
        crash_began = asyncio.run(crash(url))
        asyncio.run(wait_until_whole(url))
        return time.monotonic() - crash_began
    finally:
        sink.terminate()
        sink.wait()


async def crash(url: str) -> float:
    connection = await asyncpg.connect(url)
    query = "select pid from pg_stat_activity where application_name = 'agent-metadata-sink' limit 1"
    while (pid := await connection.fetchval(query)) is None:
        await asyncio.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    began = time.monotonic()
    with suppress(asyncpg.PostgresError, OSError):
        await connection.execute("select pg_sleep(60)")
    return began


async def wait_until_whole(url: str) -> None:
    async with asyncio.timeout(600):
        while True:
            with suppress(asyncpg.PostgresError, OSError):
                connection = await asyncpg.connect(url)
                while await connection.fetchval("select count(*) from workspace_agent_metadata") < WHOLE:
                    await asyncio.sleep(0.5)
                return await connection.close()
            await asyncio.sleep(0.1)


async def make_unlogged(url: str) -> None:
    connection = await asyncpg.connect(url)
    await migrate(connection, unlogged=True)
    await connection.close()
    await truncate(url)


async def truncate(url: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute("truncate workspace_agent_metadata")
    await connection.execute("checkpoint")
    await connection.close()


def main() -> None:
    with start_services(say=harness.say) as services:
        servers, url = services.bootstrap_servers, services.database_url
        names = {role: f"{role}-{uuid.uuid4().hex[:4]}" for role in ("batches", "dead_letter")}
        environment = {
            "KAFKA_BOOTSTRAP_SERVERS": servers,
            "DATABASE_URL": url,
            "AGENT_METADATA_LOG_FORMAT": "json",
            **{f"AGENT_METADATA_{role.upper()}_TOPIC": name for role, name in names.items()},
        }
        harness.create_topic(servers, names["dead_letter"], 1)
        harness.create_topic(servers, names["batches"])
        figures: dict[str, list[float]] = {}
        ratios = {}
        for shape, entries in SHAPES.items():
            environment["AGENT_METADATA_EVENTS_TOPIC"] = topic = f"events-{uuid.uuid4().hex[:4]}"
            harness.say(f"producing {entries:,} entries, {shape} per report")
            newest = harness.fill_events(servers, topic, entries=entries, entries_a_report=shape)
            asyncio.run(expect(url, newest))

            def plain_loop(topic: str = topic, entries: int = entries) -> float:
                side = harness.run_side("bench.replay", "plain", topic=topic, servers=servers, entries=entries)
                return float(side["entries"] / side["seconds"])

            ours, other = f"ours_{shape}", f"plain_{shape}"
            figures |= harness.in_turn({other: plain_loop, ours: lambda: replayed(environment, url)}, RUNS)
            ratios[f"replay_vs_plain_loop_{shape}"] = harness.ratio(figures, ours, other)
        for name, seconds in live(environment, url).items():
            p99 = statistics.quantiles(seconds, n=100)[98]
            harness.say(f"{name}: p99 freshness {p99:.2f} s of {len(seconds)}")
            figures[f"{name}_p99_ms"] = [p99 * 1000]
        ratios["p99_freshness_beside_replays"] = harness.ratio(
            figures, "live_beside_replays_p99_ms", "live_alone_p99_ms"
        )
        refill_environment = {**environment, "AGENT_METADATA_BATCHES_TOPIC": f"refill-{uuid.uuid4().hex[:4]}"}
        fill_batches(servers, refill_environment["AGENT_METADATA_BATCHES_TOPIC"])
        figures["refill_1m_pairs_ms"] = [refilled(refill_environment, url) * 1000 for _ in range(RUNS)]
        asyncio.run(make_unlogged(url))
        figures["crash_to_1m_pairs_ms"] = [healed(refill_environment, url) * 1000 for _ in range(RUNS)]
        harness.report(
            "replay",
            unit="entries a second; milliseconds",
            services=f"{services.broker}; {services.database}",
            figures=figures,
            ratios=ratios,
            note=__doc__ or "",
        )


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        plain(**json.loads(sys.argv[2]))
