"""The scenarios: faults, each with its second. How they are run and judged is in harness.py and verdict.py."""

from __future__ import annotations

from tests.chaos.faults import all_of, during, kafka, postgres, processes, registry, reports
from tests.chaos.faults.reports import at_rest
from tests.chaos.harness import Scenario
from tests.chaos.load import LoadShape
from tests.support import next_version, previous_version

_WORKERS_AND_SINKS = [
    Scenario("nothing_happens", steps=(), seconds=4, is_selected=True),
    Scenario("worker_killed", steps=[(at, processes.kill("worker")) for at in (2, 4.5, 7)], is_selected=True),
    Scenario(
        "sink_killed_in_transaction",
        steps=[(at, processes.kill_sink_in_transaction) for at in (2, 4.5, 7)],
        is_selected=True,
    ),
    Scenario(
        "worker_and_sink_killed",
        steps=[(at, processes.kill_sink_in_transaction_and_worker) for at in (2, 5)],
    ),
    Scenario(
        "workers_restarted_in_turn",
        steps=[(2, processes.restart_each("worker"))],
        workers=3,
    ),
    Scenario(
        "worker_frozen",  # for longer than the session timeout: another takes over, and then the first resumes
        steps=during(2, 8, processes.frozen("worker")),
        workers=2,
        seconds=11,
        is_selected=True,
    ),
    Scenario(
        "sink_frozen",
        steps=during(2, 8, processes.frozen("sink")),
        sinks=2,
        seconds=11,
    ),
    Scenario(
        "sink_frozen_in_transaction",
        steps=during(2, 8, processes.sink_frozen_in_transaction),
        sinks=2,
        seconds=11,
        is_selected=True,
    ),
    Scenario(
        "sink_frozen_in_transaction_and_cut",
        steps=[*during(2, 8, processes.sink_frozen_in_transaction), (3, postgres.end_session_of_frozen_sink)],
        sinks=2,
        seconds=11,
    ),
    Scenario(
        "workers_join_and_leave",
        steps=[(at, processes.join("worker") if at % 6 == 0 else processes.leave("worker")) for at in range(0, 16, 3)],
        seconds=16,
    ),
    Scenario(
        "replayed_under_load",  # several times, while a worker and a sink are killed
        steps=[
            (2, processes.replay("events")),
            (4, all_of(processes.kill("worker"), processes.replay("batches"))),
            (
                6,
                all_of(processes.kill_sink_in_transaction, processes.replay("events"), processes.replay("batches")),
            ),
        ],
    ),
    Scenario(
        "transactions_aborted",  # and committed, and open, around reports of no transaction
        steps=[
            (2, processes.kill("worker")),
            (4, all_of(processes.kill_sink_in_transaction, processes.replay("events"))),
            (6, processes.kill("worker")),
        ],
        load=LoadShape(transactions=True),
        is_selected=True,
    ),
    Scenario(
        "sinks_join_and_leave",
        steps=[(at, processes.join("sink") if at % 6 == 0 else processes.leave("sink")) for at in range(0, 16, 3)],
        seconds=16,
    ),
]

_UPGRADES = [
    Scenario(
        "rolling_upgrade_sink_first",  # as docs/upgrading.md says
        steps=[(2, processes.upgrade_each("sink")), (6, processes.upgrade_each("worker"))],
        workers=2,
        sinks=2,
        seconds=12,
        module=previous_version.MODULE,
        is_selected=True,
    ),
    Scenario(
        "rolling_upgrade_worker_first",
        steps=[(2, processes.upgrade_each("worker")), (6, processes.upgrade_each("sink"))],
        workers=2,
        sinks=2,
        seconds=12,
        module=previous_version.MODULE,
    ),
    Scenario(
        "newer_batches_before_newer_sinks",  # the sinks hold the partitions back until they are upgraded
        steps=[
            (2, processes.upgrade_each("worker", next_version.MODULE)),
            (8, processes.upgrade_each("sink", next_version.MODULE)),
        ],
        workers=2,
        sinks=2,
        seconds=12,
    ),
]

_KAFKA = [
    Scenario("kafka_restarted", steps=[(2, kafka.restart)], is_selected=True),
    Scenario("kafka_killed", steps=during(2, 2, kafka.crashed)),
    Scenario(
        "kafka_killed_in_transactions", steps=during(2, 2, kafka.crashed), load=LoadShape(transactions=True), seconds=10
    ),
    Scenario(
        "kafka_down",  # for longer than the session timeout
        steps=during(2, 9, kafka.stopped),
        seconds=12,
    ),
    Scenario(
        "batches_topic_missing_and_worker_killed",
        steps=[
            (2, at_rest(kafka.delete_topic("batches"))),
            (4, processes.kill("worker")),
            (6, kafka.create_topics_again),
        ],
        is_selected=True,
    ),
    Scenario(
        "batches_topic_recreated_and_outgrown",  # when the sink looks, it holds more than was read of the old one
        steps=[(0.5, at_rest(kafka.delete_topic("batches"))), (6, kafka.create_topics_again)],
        is_selected=True,
    ),
    Scenario(
        "events_lost_to_retention",  # the oracle knows which; all others count
        steps=[(3, kafka.lose_events_to_retention)],
    ),
    Scenario("topics_recreated", steps=[(4, at_rest(kafka.recreate_topics))]),
    Scenario("fresh_kafka_before_old_postgres", steps=[(4, at_rest(kafka.replace_cluster))]),
    Scenario(
        "partitions_added",
        steps=[(3, kafka.add_partitions(8)), (6, processes.restart_each("worker"))],
        seconds=12,
    ),
]

_POSTGRES = [
    Scenario("postgres_restarted", steps=[(2, postgres.restart), (5, postgres.restart)], is_selected=True),
    Scenario("postgres_killed", steps=during(2, 2, postgres.crashed)),
    Scenario("postgres_backend_killed", steps=[(2, postgres.kill_backend), (5, postgres.kill_backend)]),
    Scenario(
        "postgres_down",  # for 200 windows, which with the default of 5 s per window is a quarter of an hour
        steps=during(2, 22, postgres.stopped),
        seconds=24,
        settings={"window_seconds": 0.1},
    ),
    Scenario(
        "kafka_and_postgres_down",
        steps=[*during(2, 7, kafka.crashed), *during(2, 7, postgres.crashed)],
    ),
    Scenario("postgres_out_of_connections", steps=during(2, 6, postgres.no_free_connections)),
    Scenario("postgres_read_only", steps=during(2, 6, postgres.read_only)),
    Scenario(
        "postgres_disk_full",
        prepare=postgres.small_disk,
        steps=during(2, 6, postgres.full_disk),
        needs=postgres.why_no_small_disk,
    ),
    Scenario(
        "notify_queue_full",
        prepare=postgres.small_notify_queue,
        steps=during(2, 6, postgres.full_notify_queue),
        is_selected=True,
    ),
    Scenario(
        "listener_cut_50_times",
        steps=[(1 + number * 0.2, postgres.end_listener_sessions) for number in range(50)],
        seconds=12,
    ),
]

_BAD_RECORDS = [
    Scenario(
        "bad_records",
        steps=[(2, reports.produce("events", reports.bad_reports(10_000)))],
        dead_letters=10_000,
    ),
    Scenario(
        "bad_rows",  # which Postgres refuses although the pipeline accepts them
        steps=[
            (0, postgres.refuse_poison),
            (2, reports.report_new_agents(1000, bad=1)),
            (4, reports.report_new_agents(1000, bad=20)),
        ],
        dead_letters=21,
    ),
    Scenario(
        "bad_batches",
        steps=[(2, reports.produce("batches", reports.bad_batches(10), partition=0))],
        dead_letters=10,
    ),
    Scenario(
        "dead_letter_topic_missing",  # the worker waits for it and drops nothing, even on kill -9
        steps=[
            (2, all_of(kafka.delete_topic("dead_letter"), reports.produce("events", reports.bad_reports(5)))),
            (4, processes.kill("worker")),
            (6, kafka.create_topics_again),
        ],
        dead_letters=5,
        dead_letters_repeat=True,
    ),
]

_REGISTRY = [
    Scenario(
        "schema_registry_killed",  # while records in schemas that the worker has not seen arrive, and it is killed too
        prepare=registry.started,
        steps=[*during(2, 7, registry.crashed), (4, processes.kill("worker"))],
        load=LoadShape(schemas=30),
        seconds=10,
        is_selected=True,
    ),
]

SCENARIOS = [*_WORKERS_AND_SINKS, *_UPGRADES, *_KAFKA, *_POSTGRES, *_BAD_RECORDS, *_REGISTRY]
