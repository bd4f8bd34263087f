"""What a terminal would obey is escaped; what people can read stays."""

import pytest

from pipeline.core.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"\x1b[31mred\x1b]0;title\x07"),
        ("a\nb\r\tc\0", r"a\nb\r\tc\x00"),
        ("\x85\x9b31m\x7f", r"\x85\x9b31m\x7f"),
        ("\u2028\u2029", r"\u2028\u2029"),
        ("\ud800", r"\ud800"),
        *[(chr(code), rf"\u{code:04x}") for code in (0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))],
        ("é 日本 🚀 12% [red]:rocket:", "é 日本 🚀 12% [red]:rocket:"),
    ],
    ids=ascii,
)
def test_control_characters_are_escaped_and_the_rest_stays(text, shown):
    assert printable(text) == shown


def test_limit_counts_the_characters_of_the_text():
    assert printable("\x1b\x1b\x1b", limit=2) == r"\x1b\x1b"
