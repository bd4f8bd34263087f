"""The scenarios: at so many seconds do this. How they are run and judged is in harness.py."""

from __future__ import annotations

from tests.chaos import faults as do
from tests.chaos.faults import all_of, in_transaction
from tests.chaos.harness import Scenario

_WORKERS_AND_SINKS = [
    Scenario("nothing_happens", steps=(), seconds=4, is_selected=True),
    Scenario("worker_killed", steps=[(at, do.kill("worker")) for at in (2, 4.5, 7)], is_selected=True),
    Scenario(
        "sink_killed_in_transaction",
        steps=[(at, in_transaction(do.kill_it)) for at in (2, 4.5, 7)],
        is_selected=True,
    ),
    Scenario(
        "worker_and_sink_killed",
        steps=[(at, in_transaction(do.kill_it_and_a_worker)) for at in (2, 5)],
    ),
    Scenario(
        "workers_restarted_in_turn",
        steps=[(2, do.restart_each("worker"))],
        workers=3,
    ),
    Scenario(
        "worker_frozen",  # for longer than the session timeout: another takes over, and then it goes on
        steps=[(2, do.freeze("worker")), (8, do.thaw("worker"))],
        workers=2,
        seconds=11,
        is_selected=True,
    ),
    Scenario(
        "sink_frozen",
        steps=[(2, do.freeze("sink")), (8, do.thaw("sink"))],
        sinks=2,
        seconds=11,
    ),
    Scenario(
        "sink_frozen_in_transaction",
        steps=[(2, in_transaction(do.freeze_it)), (8, do.thaw("sink"))],
        sinks=2,
        seconds=11,
        is_selected=True,
    ),
    Scenario(
        "sink_frozen_in_transaction_and_cut",
        steps=[(2, in_transaction(do.freeze_it)), (3, do.cut_the_frozen_sink), (8, do.thaw("sink"))],
        sinks=2,
        seconds=11,
    ),
    Scenario(
        "workers_join_and_leave",
        steps=[(at, do.join("worker") if at % 6 == 0 else do.leave("worker")) for at in range(0, 16, 3)],
        seconds=16,
    ),
    Scenario(
        "replayed_under_load",  # again and again, beside a worker and a sink that are killed
        steps=[
            (2, do.replay("events")),
            (4, all_of(do.kill("worker"), do.replay("batches"))),
            (6, all_of(in_transaction(do.kill_it), do.replay("events"), do.replay("batches"))),
        ],
    ),
    Scenario(
        "sinks_join_and_leave",
        steps=[(at, do.join("sink") if at % 6 == 0 else do.leave("sink")) for at in range(0, 16, 3)],
        seconds=16,
    ),
]

_KAFKA = [
    Scenario("kafka_restarted", steps=[(2, do.restart_kafka)], is_selected=True),
    Scenario("kafka_killed", steps=[(2, do.kill_kafka), (2, do.start_kafka)]),
    Scenario(
        "kafka_away",  # for longer than the session timeout
        steps=[(2, do.stop_kafka), (9, do.start_kafka)],
        seconds=12,
    ),
    Scenario(
        "batches_topic_away_and_worker_killed",
        steps=[
            (2, all_of(do.stop_the_load, do.catch_up, do.delete("batches"), do.start_the_load)),
            (4, do.kill("worker")),
            (6, do.create),
        ],
        is_selected=True,
    ),
    Scenario(
        "batches_topic_made_anew_and_outgrown",  # it holds more than was read of the old one when the sink looks
        steps=[
            (0.5, all_of(do.stop_the_load, do.catch_up, do.delete("batches"), do.start_the_load)),
            (6, do.create),
        ],
        is_selected=True,
    ),
    Scenario(
        "events_lost_to_retention",  # the oracle knows which; all others count
        steps=[
            (3, all_of(do.stop_the_load, do.catch_up, do.mark_ends, do.leave("worker"), do.start_the_load)),
            (5, all_of(do.stop_the_load, do.delete_unread_events, do.start_the_load, do.join("worker"))),
        ],
    ),
    Scenario(
        "topics_made_anew",
        steps=[(4, all_of(do.stop_the_load, do.catch_up, do.make_topics_anew, do.start_the_load))],
    ),
    Scenario(
        "fresh_kafka_before_old_postgres",
        steps=[(4, all_of(do.stop_the_load, do.catch_up, do.bring_up_a_fresh_kafka, do.start_the_load))],
    ),
    Scenario(
        "partitions_added",
        steps=[(3, do.add_partitions(8)), (6, do.restart_each("worker"))],
        seconds=12,
    ),
]

_POSTGRES = [
    Scenario("postgres_restarted", steps=[(2, do.restart_postgres), (5, do.restart_postgres)], is_selected=True),
    Scenario("postgres_killed", steps=[(2, do.kill_postgres), (2, do.start_postgres)]),
    Scenario("postgres_backend_killed", steps=[(2, do.kill_a_backend), (5, do.kill_a_backend)]),
    Scenario(
        "postgres_away",  # 200 windows long: with the default of 5 s a window, for a quarter of an hour
        steps=[(2, do.stop_postgres), (22, do.start_postgres)],
        seconds=24,
        settings={"window_seconds": 0.1},
    ),
    Scenario(
        "kafka_and_postgres_away",
        steps=[(2, all_of(do.kill_kafka, do.kill_postgres)), (7, all_of(do.start_kafka, do.start_postgres))],
    ),
    Scenario(
        "postgres_out_of_connections",
        steps=[(2, do.take_all_connections), (6, do.give_connections_back)],
    ),
    Scenario("postgres_read_only", steps=[(2, do.read_only(True)), (6, do.read_only(False))]),
    Scenario(
        "postgres_disk_full",
        prepare=do.put_database_on_a_small_disk,
        steps=[(2, do.fill_the_disk), (6, do.empty_the_disk)],
        clean_up=do.remove_small_disk,
        needs=do.why_no_small_disk,
    ),
    Scenario(
        "notify_queue_full",
        prepare=do.shrink_notify_queue,
        steps=[(2, do.fill_notify_queue), (6, do.give_connections_back)],
        clean_up=do.restore_settings,
        is_selected=True,
    ),
    Scenario(
        "listener_cut_50_times",
        steps=[(1 + number * 0.2, do.cut_the_listener) for number in range(50)],
        seconds=12,
    ),
]

_POISON = [
    Scenario(
        "bad_records",
        steps=[(2, do.produce("events", do.bad_reports(10_000)))],
        dead_letters=10_000,
    ),
    Scenario(
        "bad_rows",  # what Postgres refuses although the pipeline lets it pass
        steps=[
            (0, do.refuse_poison),
            (2, do.report_of_new_agents(1000, bad=1)),
            (4, do.report_of_new_agents(1000, bad=20)),
        ],
        dead_letters=21,
    ),
    Scenario(
        "bad_batches",
        steps=[(2, do.produce("batches", do.bad_batches(10), partition=0))],
        dead_letters=10,
    ),
    Scenario(
        "dead_letter_topic_away",  # hold, don't drop; kill -9 meanwhile
        steps=[
            (2, all_of(do.delete("dead_letter"), do.produce("events", do.bad_reports(5)))),
            (4, do.kill("worker")),
            (6, do.create),
        ],
        dead_letters=5,
        dead_letters_repeat=True,
    ),
]

SCENARIOS = [*_WORKERS_AND_SINKS, *_KAFKA, *_POSTGRES, *_POISON]
