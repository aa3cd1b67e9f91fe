"""Safe output on a terminal: names, paths and generated text may contain escape sequences."""

from __future__ import annotations

import re

# C0 and C1 controls without tab and newline, DEL, lone surrogates, and the marks that reorder text around them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """Return the text with each control character as an escape such as `\\x1b`; tabs and newlines are kept.

    A terminal executes escape sequences: they can hide text, change the window's title or write to the clipboard.
    """
    return _CONTROLS.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), str(text))
