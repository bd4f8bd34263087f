"""The scenarios: at so many seconds do this. How they are run and judged is in harness.py."""

from __future__ import annotations

from tests.chaos.faults import (
    all_of,
    catch_up,
    create,
    delete,
    freeze,
    freeze_it,
    in_transaction,
    kill,
    kill_it,
    kill_it_and_a_worker,
    restart_kafka,
    restart_postgres,
    start_the_load,
    stop_the_load,
    thaw,
)
from tests.chaos.harness import Scenario

SCENARIOS = [
    Scenario("nothing_happens", steps=(), seconds=4, is_selected=True),
    Scenario("worker_killed", steps=[(at, kill("worker")) for at in (2, 4.5, 7)], is_selected=True),
    Scenario(
        "sink_killed_in_transaction", steps=[(at, in_transaction(kill_it)) for at in (2, 4.5, 7)], is_selected=True
    ),
    Scenario(
        "worker_and_sink_killed",
        steps=[(at, in_transaction(kill_it_and_a_worker)) for at in (2, 5)],
    ),
    Scenario(
        "worker_frozen",
        is_selected=True,
        steps=[(2, freeze("worker")), (8, thaw("worker"))],
        workers=2,
        seconds=11,
    ),
    Scenario(
        "sink_frozen",
        steps=[(2, freeze("sink")), (8, thaw("sink"))],
        sinks=2,
        seconds=11,
    ),
    Scenario(
        "sink_frozen_in_transaction",
        is_selected=True,
        steps=[(2, in_transaction(freeze_it)), (8, thaw("sink"))],
        sinks=2,
        seconds=11,
    ),
    Scenario("kafka_restarted", steps=[(2, restart_kafka)], is_selected=True),
    Scenario(
        "batches_topic_away_and_worker_killed",
        steps=[
            (2, all_of(stop_the_load, catch_up, delete("batches"), start_the_load)),
            (4, kill("worker")),
            (6, create),
        ],
        is_selected=True,
    ),
    Scenario("postgres_restarted", steps=[(2, restart_postgres), (5, restart_postgres)], is_selected=True),
]
