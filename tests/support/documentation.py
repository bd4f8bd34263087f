"""Tables, code and links of the documentation, so that tests can check them against the code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(str(file.relative_to(ROOT)) for file in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def table_rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without its head."""
    section = re.split(rf"^#+ {re.escape(heading)}$", read_page(page), flags=re.MULTILINE)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    assert lines, f"no table under {heading!r} in {page}"
    return [_cells(line) for line in lines[0].splitlines()[2:]]


def all_rows(page: str) -> list[list[str]]:
    """Return the cells of all tables of a page, heads included."""
    return [_cells(line) for line in read_page(page).splitlines() if line.startswith("|")]


def first_code(page: str, language: str) -> str:
    """Return the first code block of a language."""
    block = re.search(rf"^```{language}\n(.*?)^```$", read_page(page), re.MULTILINE | re.DOTALL)
    assert block, f"no {language} in {page}"
    return block[1]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|\n"))]
