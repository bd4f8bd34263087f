"""The store against a real Postgres: guard, exact-once progress, bisecting, NOTIFY."""

import asyncio
import uuid
from contextlib import asynccontextmanager

import asyncpg
import msgspec
import pytest

from pipeline.core.batch import Batch, Row, Source, WindowSpan
from pipeline.core.notify import MAX_IDS_PER_PAYLOAD, NOTIFY_CHANNEL, decode_agent_ids
from pipeline.core.report import agent_uuid
from pipeline.errors import ConfigError, FlushFailed, ProgressGap, SchemaMismatch, ServiceUnavailable
from pipeline.postgres import store as store_module
from pipeline.postgres.errors import translated_errors
from pipeline.postgres.names import WrittenNames
from pipeline.postgres.progress import PartitionId, Received
from pipeline.postgres.rows import read_all_rows, read_rows
from pipeline.postgres.store import Store

pytestmark = pytest.mark.services

T0_US = 1_704_067_200_000_000
BATCHES = PartitionId("batches-id", 0, "batches")
A1, A2 = (str(uuid.UUID(int=number)) for number in (1, 2))


def batch(*rows, first=0, last=None, part=1, parts=1, events_id="events-id", names=()):
    source = Source("events", events_id, 0, first, first if last is None else last)
    columns = [list(column) for column in zip(*rows, strict=True)]
    named = {agent_uuid(name): name for name in names}
    return Batch(source, WindowSpan(0, 1), "scheduled", part, parts, *columns, names=named)


def row(agent_id=A1, key="k", value="v", error="", at=0):
    return Row(agent_id, key, value, error, T0_US + at)


async def refuse_nothing(row, error):
    raise AssertionError(f"{row} was rejected: {error}")


@asynccontextmanager
async def opened(database_url, **options):
    store = await Store.connect(database_url, connections=2, **{"undeclared": "insert", "notify": True, **options})
    try:
        yield store
    finally:
        await store.close()


@pytest.fixture
async def store(connection, database_url):
    async with opened(database_url) as store:
        yield store


def acknowledged():
    done = asyncio.get_running_loop().create_future()
    done.set_result(None)
    return done


async def apply(store, *numbered, target=BATCHES, reject=refuse_nothing, earliest=0):
    received = [Received(offset, batch) for offset, batch in numbered]
    return await store.apply(target, received, reject, earliest=earliest)


async def table(connection):
    rows = await connection.fetch(
        "select workspace_agent_id, key, value, error, collected_at from workspace_agent_metadata"
    )
    return {(str(row[0]), row[1]): (row[2], row[3], round(row[4].timestamp() * 1e6) - T0_US) for row in rows}


async def test_apply_writes_rows_and_progress_together(store, connection):
    applied = await apply(store, (0, batch(row(), row(A2, value="w", error="e", at=7), first=5, last=9)))
    assert await table(connection) == {(A1, "k"): ("v", "", 0), (A2, "k"): ("w", "e", 7)}
    assert (applied.written.rows, {str(agent) for agent in applied.written.agent_ids}) == (2, {A1, A2})
    progress = await connection.fetch("select topic_id, partition, next_offset from agent_metadata_progress")
    assert {tuple(row) for row in progress} == {("batches-id", 0, 1), ("events-id", 0, 10)}
    assert await store.next_offsets("batches-id", [0, 1]) == {0: 1}


async def test_apply_older_value_never_moves_a_row_back(store, connection):
    await apply(store, (0, batch(row(value="new", at=2), first=0)))
    applied = await apply(store, (1, batch(row(value="old", at=1), first=1)))
    assert await table(connection) == {(A1, "k"): ("new", "", 2)}
    assert (applied.written.rows, applied.written.agent_ids, applied.payloads) == (0, set(), 0)


async def test_apply_on_equal_times_the_later_arrival_wins(store, connection):
    await apply(store, (0, batch(row(value="first"), first=0)))
    await apply(store, (1, batch(row(value="second"), first=1)))
    assert await table(connection) == {(A1, "k"): ("second", "", 0)}


async def test_apply_merges_waiting_batches_into_one_row(store, connection):
    applied = await apply(store, *((n, batch(row(value=f"v{n}", at=n), first=n)) for n in range(5)))
    assert await table(connection) == {(A1, "k"): ("v4", "", 4)}
    assert (len(applied.batches), applied.written.rows) == (5, 1)


@pytest.mark.parametrize("parts", [1, 2])  # with 2, no range is complete: progress alone tells
async def test_apply_same_record_again_changes_nothing(store, connection, parts):
    await apply(store, (0, batch(row(value="first"), first=0, parts=parts)))
    await apply(store, (1, batch(row(value="second"), first=1, parts=parts)))
    applied = await apply(store, (0, batch(row(value="first"), first=0, parts=parts)))
    assert await table(connection) == {(A1, "k"): ("second", "", 0)}
    assert (applied.batches, applied.written.rows) == ([], 0)


async def test_apply_zombie_workers_late_batch_changes_nothing(store, connection):
    await apply(store, (0, batch(row(value="new owner"), first=0, last=9)))
    applied = await apply(store, (1, batch(row(value="zombie"), first=0, last=7)))
    assert await table(connection) == {(A1, "k"): ("new owner", "", 0)}
    assert applied.skipped == 1


async def test_apply_range_counts_with_its_last_part_only(store, connection):
    await apply(store, (0, batch(row(key="a"), first=0, last=9, part=1, parts=2)))
    applied = await apply(
        store,
        (1, batch(row(key="a"), first=0, last=9, part=1, parts=2)),
        (2, batch(row(key="b"), first=0, last=9, part=2, parts=2)),
    )
    assert (len(applied.batches), applied.skipped) == (2, 0)
    assert set(await table(connection)) == {(A1, "a"), (A1, "b")}


async def test_apply_of_a_recreated_events_topic_is_not_skipped(store, connection):
    await apply(store, (0, batch(row(value="old"), first=0, last=900)))
    applied = await apply(store, (1, batch(row(value="new", at=1), first=0, last=3, events_id="events-id-2")))
    assert applied.skipped == 0
    assert await table(connection) == {(A1, "k"): ("new", "", 1)}


async def test_apply_of_a_recreated_batches_topic_begins_at_0(store, connection):
    await apply(store, (0, batch(row(value="old"), first=0)), (1, batch(row(value="old"), first=1)))
    await apply(store, (0, batch(row(value="new", at=1), first=2)), target=BATCHES._replace(topic_id="recreated"))
    assert await table(connection) == {(A1, "k"): ("new", "", 1)}


async def test_apply_records_after_a_gap_are_refused_until_the_gap_is_explained(store, connection):
    await apply(store, (0, batch(row(), first=0)))
    late = (5, batch(row(value="late", at=1), first=9))
    with pytest.raises(ProgressGap, match="next offset to apply is 1"):
        await apply(store, late)
    assert await table(connection) == {(A1, "k"): ("v", "", 0)}
    assert (await apply(store, late, earliest=5)).lost == 4
    assert await table(connection) == {(A1, "k"): ("late", "", 1)}


async def test_apply_dead_lettered_record_moves_progress(store):
    await apply(store, (0, None), (1, batch(row())))
    assert await store.next_offsets("batches-id", [0]) == {0: 2}


async def test_apply_two_sinks_with_one_partition_apply_each_batch_once(database_url, connection):
    async with opened(database_url) as one, opened(database_url) as other:
        numbered = [(n, batch(row(value=f"v{n}", at=n), first=n)) for n in range(20)]
        results = await asyncio.gather(*(apply(store, *numbered) for store in (one, other) * 4))
    assert sum(len(applied.batches) for applied in results) == 20
    assert sum(applied.written.rows for applied in results) == 1


async def test_apply_unchanged_row_is_not_written_and_not_notified(store):
    await apply(store, (0, batch(row(), first=0)))
    applied = await apply(store, (1, batch(row(), first=1)))
    assert (applied.written.rows, applied.payloads) == (0, 0)


async def test_apply_ignoring_undeclared_pairs_updates_declared_rows_only(database_url, connection):
    await connection.execute(
        "insert into workspace_agent_metadata (workspace_agent_id, key, display_name) values ($1, 'k', 'K')",
        uuid.UUID(A1),
    )
    async with opened(database_url, undeclared="ignore") as store:
        applied = await apply(store, (0, batch(row(), row(key="unknown"), row(A2))))
    assert await table(connection) == {(A1, "k"): ("v", "", 0)}
    assert {str(agent) for agent in applied.written.agent_ids} == {A1}


async def test_apply_notifies_changed_agents_in_payloads_of_363(store, connection, database_url):
    payloads = []
    listening = await asyncpg.connect(database_url)
    await listening.add_listener(NOTIFY_CHANNEL, lambda *notification: payloads.append(notification[3]))
    agents = [str(uuid.uuid4()) for _ in range(MAX_IDS_PER_PAYLOAD + 1)]
    applied = await apply(store, (0, batch(*(row(agent) for agent in agents))))
    while len(payloads) < 2:
        await asyncio.wait_for(listening.fetchval("select 1"), 5)
    await listening.close()
    assert [len(payload) for payload in payloads] == [363 * 22, 22]
    assert sorted(str(agent) for payload in payloads for agent in decode_agent_ids(payload)) == sorted(agents)
    assert applied.payloads == 2


async def test_apply_with_notify_off_sends_none(database_url, connection):
    async with opened(database_url, notify=False) as store:
        assert (await apply(store, (0, batch(row())))).payloads == 0


async def test_apply_row_that_postgres_refuses_costs_itself_alone(store, connection):
    await connection.execute("alter table workspace_agent_metadata add check (value <> 'poison')")
    rows = [row(key=f"k{n:04}", value="poison" if n in (17, 1500) else "fine") for n in range(2000)]
    rejected = []

    async def reject(row, error):
        rejected.append((row.key, error.sqlstate))
        return acknowledged()

    applied = await apply(store, (0, batch(*rows)), reject=reject)
    assert rejected == [("k0017", "23514"), ("k1500", "23514")]
    assert (applied.written.rows, applied.written.rejected, len(await table(connection))) == (1998, 2, 1998)


async def test_apply_one_pair_in_two_spellings_holds_nothing_back(store, connection):
    shouting = str(uuid.UUID(int=0xABC)).upper()
    await apply(store, (0, batch(row(shouting, value="v"), row(shouting.lower(), value="w", at=1))))
    assert await table(connection) == {(shouting.lower(), "k"): ("w", "", 1)}


async def test_apply_check_that_waits_for_the_commit_costs_its_row_alone(store, connection):
    await connection.execute("""
        create function refuse() returns trigger language plpgsql as
        $$ begin
            if new.value = 'poison' then raise check_violation using message = 'no poison'; end if;
            return new;
        end $$
    """)
    await connection.execute("""
        create constraint trigger refuse after insert or update on workspace_agent_metadata
        deferrable initially deferred for each row execute function refuse()
    """)
    rejected = []

    async def reject(row, error):
        rejected.append((row.key, error.sqlstate))
        return acknowledged()

    await apply(store, (0, batch(row(), row(key="p", value="poison"))), reject=reject)
    assert rejected == [("p", "23514")]
    assert len(await table(connection)) == 1


async def test_apply_dead_letter_that_kafka_does_not_take_commits_nothing(store, connection):
    await connection.execute("alter table workspace_agent_metadata add check (value <> 'poison')")

    async def reject(row, error):
        refused = asyncio.get_running_loop().create_future()
        refused.set_exception(ServiceUnavailable("Kafka did not take it"))
        return refused

    with pytest.raises(ServiceUnavailable):
        await apply(store, (0, batch(row(), row(key="p", value="poison"))), reject=reject)
    assert await table(connection) == {}
    assert await store.next_offsets("batches-id", [0]) == {}


async def test_apply_failing_reject_commits_nothing(store, connection):
    await connection.execute("alter table workspace_agent_metadata add check (value <> 'poison')")

    async def reject(row, error):
        raise ServiceUnavailable("the dead-letter topic is unavailable")

    with pytest.raises(ServiceUnavailable):
        await apply(store, (0, batch(row(), row(key="p", value="poison"))), reject=reject)
    assert await table(connection) == {}
    assert await store.next_offsets("batches-id", [0]) == {}


async def test_apply_gives_its_locks_back_when_its_sink_falls_silent(database_url, connection, monkeypatch):
    monkeypatch.setattr(store_module, "IDLE_TRANSACTION_SECONDS", 0.5)
    await connection.execute("alter table workspace_agent_metadata add check (value <> 'poison')")
    is_silent = asyncio.Event()

    async def fall_silent(row, error):
        is_silent.set()
        await asyncio.Event().wait()

    async def reject(row, error):
        return acknowledged()

    batches = (0, batch(row(value="poison")))
    async with opened(database_url) as silent, opened(database_url) as new_owner:
        applying = asyncio.create_task(apply(silent, batches, reject=fall_silent))
        await is_silent.wait()
        assert (await asyncio.wait_for(apply(new_owner, batches, reject=reject), 30)).written.rejected == 1
        applying.cancel()
        await asyncio.wait([applying])


@pytest.mark.parametrize(
    ("sqlstate", "error"),
    [
        ("57P01", ServiceUnavailable),  # shutdown
        ("53300", ServiceUnavailable),  # too many connections
        ("53100", ServiceUnavailable),  # disk full
        ("40P01", ServiceUnavailable),  # deadlock
        ("55P03", ServiceUnavailable),  # lock not available
        ("25006", ServiceUnavailable),  # read-only
        ("XX000", ServiceUnavailable),  # internal error
        ("42P01", SchemaMismatch),  # no such table
        ("42501", ConfigError),  # no rights
    ],
)
async def test_errors_are_told_apart_by_sqlstate(connection, sqlstate, error):
    with pytest.raises(error, match=sqlstate):
        async with translated_errors("testing"):
            await connection.execute(f"do $$ begin raise exception 'refused' using errcode = '{sqlstate}'; end $$")


async def test_connect_to_nothing_is_unavailable():
    with pytest.raises(ServiceUnavailable, match="did not answer while connecting"):
        await Store.connect("postgresql://127.0.0.1:1/none", connections=1, undeclared="insert", notify=True)


async def test_transaction_that_fails_at_its_commit_counts_its_payloads(store, connection):
    await connection.execute(
        "create function fail() returns trigger language plpgsql as "
        "$$ begin raise exception 'the NOTIFY queue is full' using errcode = '54000'; end $$"
    )
    await connection.execute(
        "create constraint trigger fail after insert on workspace_agent_metadata "
        "deferrable initially deferred for each row execute function fail()"
    )
    with pytest.raises(FlushFailed) as failure:
        await apply(store, (0, batch(row())))
    assert failure.value.payloads == 1
    assert await table(connection) == {}


async def test_transaction_that_fails_before_its_notify_counts_no_payloads(store, connection):
    await connection.execute(
        "create function fail() returns trigger language plpgsql as "
        "$$ begin raise exception 'the disk is full' using errcode = '53100'; end $$"
    )
    await connection.execute(
        "create trigger fail before insert on workspace_agent_metadata for each row execute function fail()"
    )
    with pytest.raises(FlushFailed) as failure:
        await apply(store, (0, batch(row())))
    assert failure.value.payloads == 0


async def test_rows_of_new_pairs_are_counted_apart_from_changed_ones(store):
    applied = await apply(store, (0, batch(row(), row(A2), first=0)))
    assert (applied.written.rows, applied.written.inserted) == (2, 2)
    applied = await apply(store, (1, batch(row(at=1), row(A2, at=1), row(A2, "new"), first=1)))
    assert (applied.written.rows, applied.written.inserted) == (3, 1)
    applied = await apply(store, (2, batch(row(at=2), first=2)))
    assert (applied.written.rows, applied.written.inserted) == (1, 0)


async def test_stale_rows_are_counted_apart_from_unchanged_ones(store):
    await apply(store, (0, batch(row(at=10), row(A2, at=10), row(A2, "other", at=10), first=0)))
    again = batch(row(value="late", at=9), row(A2, at=10), row(A2, "new", at=1), row(A2, "other", "w", at=11), first=1)
    applied = await apply(store, (1, again))
    assert (applied.pairs, applied.written.rows, applied.written.stale) == (4, 2, 1)


async def test_stale_rows_are_not_counted_where_undeclared_pairs_are_ignored(connection, database_url):
    async with opened(database_url) as store:
        await apply(store, (0, batch(row(at=10))))
    async with opened(database_url, undeclared="ignore") as store:
        applied = await apply(store, (1, batch(row(at=9), row(A2), first=1)))
    assert (applied.pairs, applied.written.rows, applied.written.stale) == (2, 0, 0)


async def test_ping_fails_when_postgres_does_not_answer(store):
    await store.ping()
    await store.close()
    with pytest.raises(ServiceUnavailable):
        await store.ping()


@pytest.mark.parametrize("bad", ["not-a-uuid", "", "zzzzzzzz-0000-0000-0000-000000000000"])
async def test_apply_row_that_the_client_library_refuses_costs_itself_alone(store, connection, bad):
    rejected = []

    async def reject(row, error):
        rejected.append(row.agent_id)
        return acknowledged()

    await asyncio.wait_for(apply(store, (0, batch(row(bad), row())), reject=reject), 20)
    assert rejected == [bad]
    assert len(await table(connection)) == 1


HOST, OTHER = "host-17", "Zürich \u202e<b>"


def of(name, **fields):
    return row(agent_uuid(name), **fields)


async def names(connection):
    found = await connection.fetch("select agent_id, name from agent_metadata_names")
    return {str(agent_id): name for agent_id, name in found}


def named(*some):
    return {agent_uuid(name): name for name in some}


async def test_apply_keeps_the_names_of_agents_with_their_rows(store, connection):
    rows = sorted((of(HOST), of(OTHER), row()))
    await apply(store, (0, batch(*rows, names=[HOST, OTHER])))
    assert await names(connection) == named(HOST, OTHER)
    read = await anext(read_all_rows(connection))
    assert {str(found.agent_id): found.name for found in read} == {**named(HOST, OTHER), A1: None}
    assert {found.name for found in await read_rows(connection, [uuid.UUID(agent_uuid(HOST))])} == {HOST}


async def test_names_are_written_once_and_again_after_ten_minutes(store, connection, monkeypatch):
    now = 0.0
    store._written_names = WrittenNames(lambda: now)
    for offset in range(2):
        await apply(store, (offset, batch(of(HOST, at=offset), first=offset, names=[HOST])))
        await connection.execute("delete from agent_metadata_names")
    assert await names(connection) == {}
    now = 601.0
    await apply(store, (2, batch(of(HOST, at=2), first=2, names=[HOST])))
    assert await names(connection) == named(HOST)


async def test_names_of_a_transaction_that_is_rolled_back_are_written_by_the_next(store, connection):
    await connection.execute("""
        create function fail() returns trigger language plpgsql
        as $$ begin raise exception using errcode = '53100'; end $$;
        create constraint trigger full_disk after insert on agent_metadata_names deferrable initially deferred
        for each row execute function fail()
    """)  # which fails at the commit
    with pytest.raises(FlushFailed):
        await apply(store, (0, batch(of(HOST), names=[HOST])))
    assert (await table(connection), await names(connection)) == ({}, {})
    await connection.execute("drop trigger full_disk on agent_metadata_names")
    await apply(store, (0, batch(of(HOST), names=[HOST])))
    assert await names(connection) == named(HOST)


async def test_two_sinks_write_the_same_names_at_once_in_either_order(database_url, store, connection):
    some = [f"host-{number}" for number in range(300)]
    rows = sorted(of(name, key=key) for name in some for key in ("a", "b"))
    async with opened(database_url) as other:
        await asyncio.gather(
            *(
                apply(each, (0, batch(*rows, names=order)), target=PartitionId("batches-id", number, "batches"))
                for number, (each, order) in enumerate([(store, some), (other, some[::-1])] * 2)
            )
        )
    assert await names(connection) == named(*some)


async def test_agent_gets_its_name_with_its_first_row(database_url, connection):
    async with opened(database_url, undeclared="ignore") as ignoring:
        await apply(ignoring, (0, batch(of(HOST), names=[HOST])))
        assert await names(connection) == {}
        await connection.execute(
            "insert into workspace_agent_metadata (workspace_agent_id, key) values ($1, 'k')", agent_uuid(HOST)
        )  # its key is declared
        await apply(ignoring, (1, batch(of(HOST, at=1), first=1, names=[HOST])))
        assert await names(connection) == named(HOST)


@pytest.mark.parametrize("lie", [{A1: HOST}, {"no id": HOST}, {A1: ""}, {A1: "x" * 256}])
async def test_what_is_no_name_of_its_agent_is_ignored_and_its_rows_are_written(store, connection, lie):
    lying = msgspec.structs.replace(batch(row()), names=lie)
    applied = await apply(store, (0, lying))
    assert (applied.written.rows, await names(connection)) == (1, {})


async def test_rows_that_postgres_refuses_leave_the_names_of_the_others(store, connection):
    async def reject(refused, _error):
        rejected.append(refused.key)
        return acknowledged()

    rejected = []
    rows = sorted((of(HOST), of(OTHER, key="k" * 200)))
    await apply(store, (0, batch(*rows, names=[HOST, OTHER])), reject=reject)
    assert (rejected, await names(connection)) == (["k" * 200], named(HOST))


async def test_replay_keeps_names_even_of_rows_that_are_as_new(store, connection):
    await apply(store, (0, batch(of(HOST))))  # by a worker that knew no names
    written = await store.replay(batch(of(HOST)).columns, named(HOST), refuse_nothing)
    assert (written.rows, await names(connection)) == (0, named(HOST))
