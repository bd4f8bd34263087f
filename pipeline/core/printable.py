"""Foreign text on one line of a terminal: shown, never obeyed."""

from __future__ import annotations


def printable(text: str, limit: int | None = None) -> str:
    r"""Return the first `limit` characters of a text that anybody may have written, harmless on a terminal.

    Guarantee: one line. Line breaks, escape sequences and other control characters, lone surrogates and characters that
    turn the direction of text are written as repr() writes them (\n, \x1b, \u202e); letters, signs and emoji stay.
    """
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text[:limit])
