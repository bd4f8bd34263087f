"""Rules of the source tree that no linter checks."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_LINES, MAX_MODULES, MAX_NAME_CHARS = 300, 12, 79
PIPELINE = sorted((ROOT / "pipeline").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
BENCH = sorted((ROOT / "bench").rglob("*.py"))


def nodes(path):
    return ast.walk(ast.parse(path.read_text(encoding="utf-8")))


def imported_packages(path):
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]


@pytest.mark.parametrize("paths", [PIPELINE, TESTS, BENCH], ids=["pipeline", "tests", "bench"])
def test_sources_are_found(paths):
    assert len(paths) > 5


def test_no_module_of_the_pipeline_is_over_300_lines():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PIPELINE}
    assert {str(path.relative_to(ROOT)): count for path, count in lines.items() if count > MAX_LINES} == {}


def test_no_folder_of_the_pipeline_has_over_12_modules():
    counts = Counter(path.parent for path in PIPELINE if path.name not in ("__init__.py", "__main__.py"))
    assert {str(path.relative_to(ROOT)): count for path, count in counts.items() if count > MAX_MODULES} == {}


def test_no_benchmark_imports_the_tests():
    assert [path.name for path in BENCH if "tests" in imported_packages(path)] == []


def test_no_name_of_a_test_is_over_79_characters():
    names = [
        node.name
        for path in TESTS
        for node in nodes(path)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert [name for name in names if len(name) > MAX_NAME_CHARS] == []
