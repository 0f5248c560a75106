"""The text of an error is one line, whatever it quotes."""

import pytest

from corefw.errors import MigfwError, UriError, one_line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("as it is: 'a  b', ä", "as it is: 'a  b', ä"),
        ("of\n several\r\n\n  lines\n", "of several lines"),
        ("other\u2028ends\x0bof lines", "other ends of lines"),
        ("\x1b[2J", "\\x1b[2J"),
        ("byte \udcff", "byte \\udcff"),
    ],
)
def test_a_text_becomes_one_line(text: str, line: str) -> None:
    assert one_line(text) == line
    assert str(UriError(text)) == line


def test_an_error_without_words() -> None:
    assert str(MigfwError()) == ""
