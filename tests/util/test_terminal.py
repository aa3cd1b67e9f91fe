import pytest

from btm_scale.util.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ünïcode 汉字\n\ttext", "plain ünïcode 汉字\n\ttext"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\rb\x9b31m", "a\\rb\\x9b31m"),
        ("file\u202egpj.exe", "file\\u202egpj.exe"),
        ("lone \ud800", "lone \\ud800"),
    ],
)
def test_control_characters_are_shown_and_never_sent(text: str, shown: str):
    assert printable(text) == shown
    printable(text).encode("utf-8")
