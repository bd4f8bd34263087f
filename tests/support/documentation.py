"""Tables and code of the documentation, so that tests can check them against the code."""

from __future__ import annotations

import re
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def table_rows(page: str, heading: str) -> list[list[str]]:
    """Return the cells of the first table under a heading, without its head."""
    text = (_ROOT / page).read_text(encoding="utf-8")
    section = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.MULTILINE)[1]
    lines = re.search(r"(?:^\|.*\n)+", section, flags=re.MULTILINE)
    assert lines, f"no table under {heading!r} in {page}"
    return [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in lines[0].splitlines()[2:]]


def first_code(page: str, language: str) -> str:
    """Return the first code block of a language."""
    block = re.search(
        rf"^```{language}\n(.*?)^```$", (_ROOT / page).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert block, f"no {language} in {page}"
    return block[1]
