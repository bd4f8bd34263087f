"""What README.md says of metadatabatcher and the tests that show it are the same."""

import re
from pathlib import Path

from tests.parity.cases import CASES, DIFFERENCES
from tests.support.documentation import table_rows


def test_each_difference_from_metadatabatcher_has_a_reason_a_test_and_a_row():
    rows = table_rows("README.md", "Differences from metadatabatcher")
    assert [row for row in rows if len(row) != 4 or not all(row)] == []
    shown_by = [row[3] for row in rows]
    functions = {name[1:-1] for name in shown_by if name.startswith("`")}
    tests = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parents[1].rglob("test_*.py"))
    assert functions <= set(re.findall(r"^(?:async )?def (test_\w+)", tests, flags=re.MULTILINE))
    assert {name for name in shown_by if not name.startswith("`")} == {case.name for case in DIFFERENCES}


def test_cases_have_names_of_their_own():
    names = [case.name for case in (*CASES, *DIFFERENCES)]
    assert len(names) == len(set(names))
