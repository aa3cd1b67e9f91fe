"""Standard streams as services, schedulers and old locales leave them."""

from __future__ import annotations

import os
import sys


def open_missing_streams() -> None:
    """Open /dev/null as each standard stream that is closed, as some services start their programs.

    The next file would get its number, and what a library prints would be written into that file.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def escape_unknown_characters() -> None:
    """Let stdout print a character that its encoding lacks as an escape such as `\\u2013`, as stderr does.

    Tables have such characters, and a locale of a cluster's nodes may be ASCII or Latin-1.
    """
    if sys.stdout.errors != "backslashreplace":
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
