"""Standard streams as services, schedulers and old locales leave them."""

from __future__ import annotations

import os
import sys


def open_missing_streams() -> None:
    """Open /dev/null in place of closed standard streams, with which some services start their programs.

    The next file to be opened would get the stream's number, and a library's output would be written into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def escape_unknown_characters() -> None:
    """Print characters that the encoding of stdout lacks as escapes such as `\\u2013`, as stderr does.

    Tables have such characters, and the locale of a cluster's nodes may be ASCII or Latin-1.
    """
    if sys.stdout.errors != "backslashreplace":
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
