"""The guarded write on a real Postgres: any order, repetition and cut of the same events ends in the same table."""

import asyncio
import itertools
import uuid

import asyncpg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.core.batch import Batch, Row, Source, WindowSpan, merge
from pipeline.postgres.migrations import migrate
from pipeline.postgres.progress import PartitionId, Received
from pipeline.postgres.store import Store

pytestmark = pytest.mark.services

PAIRS = [(str(uuid.UUID(int=agent)), key) for agent in (1, 2) for key in ("cpu", "mem")]
ROWS = st.builds(
    lambda pair, value, at: Row(*pair, str(value), "", at), st.sampled_from(PAIRS), st.integers(), st.integers(0, 9)
)
on_real_postgres = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
async def written(database_url):
    """A store whose statements are noted: (store, connection, statements)."""
    statements = []

    async def note_statements(connection):
        connection.add_query_logger(lambda logged: statements.append(logged.query))

    connection = await asyncpg.connect(database_url)
    await migrate(connection)
    async with asyncpg.create_pool(database_url, min_size=1, max_size=2, init=note_statements) as pool:
        yield Store(pool, undeclared="insert", notify=True), connection, statements
    await connection.close()


def cut(rows, sizes):
    """Cut rows into lists of these sizes, in turn."""
    rows = iter(rows)
    parts = (list(itertools.islice(rows, size)) for size in itertools.cycle(sizes))
    return list(itertools.takewhile(bool, parts))


def batch(rows, *, events_id, first=0):
    source = Source("events", "id", 0, 0, 0)
    columns = merge([Batch(source, WindowSpan(0, 1), "scheduled", 1, 1, *zip(*rows, strict=True))])
    return Batch(
        Source("events", events_id, 0, first, first + len(rows) - 1), WindowSpan(0, 1), "scheduled", 1, 1, *columns
    )


def naive(rows):
    newest = {}
    for row in rows:
        held = newest.get(row[:2])
        if held is None or row.collected_at_us >= held.collected_at_us:
            newest[row[:2]] = row
    return {pair: (row.value, row.collected_at_us) for pair, row in newest.items()}


async def table(connection):
    rows = await connection.fetch(
        "select workspace_agent_id, key, value, (extract(epoch from collected_at) * 1000000)::bigint "
        "from workspace_agent_metadata"
    )
    return {(str(row[0]), row[1]): (row[2], row[3]) for row in rows}


async def empty(connection):
    await connection.execute("truncate workspace_agent_metadata, agent_metadata_progress")


async def refuse_nothing(row, error):
    raise AssertionError(f"{row} was rejected: {error}")


@on_real_postgres
@given(
    st.lists(ROWS, max_size=20, unique_by=lambda row: (row.agent_id, row.key, row.collected_at_us)),
    st.lists(st.integers(1, 6), min_size=1),
    st.lists(st.integers(1, 4), min_size=1),
    st.randoms(),
)
async def test_any_order_repetition_and_cut_ends_in_the_same_table(written, rows, batch_sizes, apply_sizes, dice):
    store, connection, _ = written
    await empty(connection)
    shuffled = [*rows, *rows]
    dice.shuffle(shuffled)
    # Each from an events topic of its own: nothing but the guard tells old from new.
    batches = [batch(part, events_id=f"events-{number}") for number, part in enumerate(cut(shuffled, batch_sizes))]
    for part in cut(enumerate(batches), apply_sizes):
        received = [Received(offset, one) for offset, one in part]
        await store.apply(PartitionId("batches-id", 0, "batches"), received, refuse_nothing)
    assert await table(connection) == naive(rows)


@on_real_postgres
@given(
    st.lists(ROWS, max_size=20),
    st.lists(st.integers(1, 6), min_size=1),
    st.lists(st.integers(1, 4), min_size=1),
    st.data(),
)
async def test_any_cut_in_order_with_late_repetitions_keeps_the_last_of_equal_times(
    written, rows, batch_sizes, apply_sizes, data
):
    """What an old owner of the partition, or an old worker, writes again changes nothing, ties included."""
    store, connection, _ = written
    await empty(connection)
    parts, first, batches = cut(rows, batch_sizes), 0, []
    for part in parts:
        batches.append(batch(part, events_id="events-id", first=first))
        first += len(part)
    target, received = PartitionId("batches-id", 0, "batches"), list(itertools.starmap(Received, enumerate(batches)))
    for part in cut(received, apply_sizes):
        await store.apply(target, part, refuse_nothing)
        first, last = sorted(data.draw(st.integers(0, part[-1].offset)) for _ in range(2))
        await store.apply(target, received[first : last + 1], refuse_nothing)
    late = [Received(len(batches) + number, one) for number, one in enumerate(batches)]
    if late:
        await store.apply(target, late[: data.draw(st.integers(1, len(late)))], refuse_nothing)
    assert await table(connection) == naive(rows)


async def test_bad_row_among_a_thousand_costs_at_most_21_writes(written):
    store, connection, statements = written
    await connection.execute("alter table workspace_agent_metadata add check (value <> 'bad')")
    rows = [Row(str(uuid.UUID(int=n)), "cpu", "bad" if n == 617 else "good", "", 0) for n in range(1000)]
    rejected = []

    async def reject(row, error):
        rejected.append((row, error.sqlstate))
        return asyncio.sleep(0)  # Kafka has it at once

    target = PartitionId("batches-id", 0, "batches")
    await store.apply(target, [Received(0, batch(rows, events_id="events-id"))], reject)
    assert rejected == [(rows[617], "23514")]
    assert len(await table(connection)) == 999
    # The first try of all, and then two halves at each of the ten levels down to the row.
    assert sum("update workspace_agent_metadata" in text for text in statements) <= 1 + 1 + 2 * 10
