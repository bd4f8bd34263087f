"""What the documentation says in tables and links is true."""

import json
import re
import tomllib

import pytest
from pydantic import SecretStr

from pipeline.settings import CONFIG_FILE_VARIABLE, Settings, describe_settings
from tests.chaos.scenarios import SCENARIOS
from tests.parity.cases import CASES, DIFFERENCES
from tests.support.documentation import PAGES, ROOT, all_rows, read_page, table_rows

# The files that a package index or a search engine shows without the rest of the repository around them.
REPOSITORY = tomllib.loads(read_page("pyproject.toml"))["project"]["urls"]["Repository"]


def test_readme_has_at_most_9000_bytes():
    assert len(read_page("README.md").encode()) <= 9000


@pytest.mark.parametrize("page", ["README.md", "DESIGN.md", "CHANGELOG.md"])
def test_links_of_pages_that_are_shown_elsewhere_are_absolute(page):
    targets = re.findall(r"\]\(([^)]+)\)|^\[[^\]]+\]: (\S+)", read_page(page), flags=re.MULTILINE)
    assert [target for pair in targets for target in pair if target and not target.startswith("https://")] == []


def test_links_into_the_repository_lead_to_files_that_exist():
    raw = REPOSITORY.replace("https://github.com/", "https://raw.githubusercontent.com/") + "/main"
    pattern = re.compile(rf"(?:{re.escape(REPOSITORY)}/blob/main|{re.escape(raw)})/([^\s)#\"]+)")
    links = [(page, path) for page in (*PAGES, "pyproject.toml") for path in pattern.findall(read_page(page))]
    assert len(links) > 20
    assert [(page, path) for page, path in links if not (ROOT / path).exists()] == []


def test_reference_links_of_the_readme_are_defined_and_used():
    readme = re.sub(r"^(```.*?^```|    .*?$)", "", read_page("README.md"), flags=re.MULTILINE | re.DOTALL)
    defined = set(re.findall(r"^\[([^\]]+)\]: ", readme, flags=re.MULTILINE))
    used = {
        (reference or text).lower().replace("\n", " ")
        for text, reference in re.findall(r"(?<!!)\[([^\[\]]+)\](?:\[([^\]]+)\])?(?![(:])", readme)
    }
    assert used == defined


def test_settings_are_documented_by_their_full_names_with_their_defaults():
    documented = {row[0][1:-1]: row[1].strip("`") for row in all_rows("docs/settings.md") if re.match("`[A-Z]", row[0])}
    defaults = {
        variable: field.default
        for (variable, *_), field in zip(describe_settings(Settings()), Settings.model_fields.values(), strict=True)
    }
    assert documented == {variable: shown(default) for variable, default in defaults.items()}
    assert f"`{CONFIG_FILE_VARIABLE}`" in read_page("docs/settings.md")


def shown(default: object) -> str:
    if isinstance(default, SecretStr):
        return default.get_secret_value()
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)


def test_chaos_page_has_every_scenario_and_the_recorded_totals():
    assert [row[0][1:-1] for row in table_rows("docs/chaos.md", "Scenarios")] == [item.name for item in SCENARIOS]
    results = json.loads(read_page("bench/results/chaos.json"))["scenarios"]
    page = read_page("docs/chaos.md")
    for count, what in (
        (len(results), "scenarios"),
        (sum(len(item["seeds"]) for item in results), "runs"),
        (sum(item["events"] for item in results), "reports"),
        (sum(item["rows"] for item in results), "rows"),
    ):
        assert f"{count:,} {what}" in page
    for problem in ("rows_wrong", "batches_twice", "moves_back", "unnoticed", "problems"):
        assert sum(item[problem] for item in results) == 0


def test_each_difference_from_metadatabatcher_has_a_reason_a_test_and_a_row():
    rows = table_rows("docs/metadatabatcher.md", "Differences")
    assert [row for row in rows if len(row) != 4 or not all(row)] == []
    shown_by = [row[3] for row in rows]
    functions = {name[1:-1] for name in shown_by if name.startswith("`")}
    tests = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    assert functions <= set(re.findall(r"^(?:async )?def (test_\w+)", tests, flags=re.MULTILINE))
    assert {name for name in shown_by if not name.startswith("`")} == {case.name for case in DIFFERENCES}


def test_cases_have_names_of_their_own():
    names = [case.name for case in (*CASES, *DIFFERENCES)]
    assert len(names) == len(set(names))
