"""A selection of the scenarios, one seed each; `make chaos` runs all of them with several."""

import pytest

from pipeline.local import PackagedKafka, PackagedPostgres
from tests.chaos.broken import MUTANTS
from tests.chaos.harness import Run, Services
from tests.chaos.scenarios import SCENARIOS

pytestmark = pytest.mark.services

SELECTED = [scenario for scenario in SCENARIOS if scenario.is_selected]
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


@pytest.fixture(scope="module")
def own_services(kafka_jars):
    """A Kafka and a Postgres for these tests alone: they are broken on purpose."""
    with PackagedKafka(kafka_jars) as kafka, PackagedPostgres() as postgres:
        yield Services(kafka, postgres)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("scenario", SELECTED, ids=lambda scenario: scenario.name)
async def test_nothing_is_lost_twice_or_backwards_when(scenario, own_services, tmp_path):
    verdict = await Run(own_services, scenario, 1, tmp_path).perform()
    assert verdict.is_right, str(verdict)  # pytest would cut it short


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mutant", "scenario", "found"),
    [
        ("commit_first", "batches_topic_missing_and_worker_killed", "rows_wrong"),
        ("no_guard", "nothing_happens", "moves_back"),
        ("aborted_read", "transactions_aborted", "rows_wrong"),
        ("no_progress_check", "worker_frozen", "moves_back"),
    ],
)
async def test_harness_finds(mutant, scenario, found, own_services, tmp_path):
    assert mutant in MUTANTS
    module = ("tests.chaos.broken", mutant)
    for seed in (1, 2, 3):  # by chance nothing of what went wrong may be left at the end
        verdict = await Run(own_services, BY_NAME[scenario], seed, tmp_path, module=module).perform()
        if getattr(verdict, found):
            return
    pytest.fail(f"not found with three seeds: {verdict}")
