"""What `doctor` found, as tables on a terminal and as plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from btm_scale.util.terminal import printable

_STYLES = {"ok": "green", "yes": "green", "low": "yellow", "no": "yellow", "missing": "yellow"}
_INDENT = " " * 6
_LEAST_TEXT = 20  # columns of the text, however narrow the terminal is

Row = tuple[str, str, str]


def print_doctor(answer: Mapping[str, Any]) -> None:
    """Print all findings by part, and then what works."""
    sections = list(_sections(answer))
    if sys.stdout.isatty():
        try:
            _print_tables(sections)
            return
        except ImportError:  # rich may be what is missing
            pass
    names, states = (max(len(row[column]) for _, rows in sections for row in rows) for column in (0, 1))
    columns = max(shutil.get_terminal_size().columns, names + states + 6 + _LEAST_TEXT)
    for title, rows in sections:
        print(title)
        for name, state, text in rows:
            start = f"  {name:<{names}}  {state:<{states}}  "
            print(_wrapped(start, text, columns))


def _wrapped(start: str, text: str, columns: int) -> str:
    """Return the text after `start`, its lines aligned; below it if a path is too long for the rest of the line."""
    is_long = any(len(word) > columns - len(start) for word in text.split())
    first, later = (_INDENT, _INDENT) if is_long else (start, " " * len(start))
    # A path or an option can be copied only if it is not cut.
    lines = textwrap.wrap(
        text, columns, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join([start.rstrip(), *lines] if is_long else lines or [start.rstrip()])


def _print_tables(sections: Sequence[tuple[str, list[Row]]]) -> None:
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console()
    names, states = (max(len(row[column]) for _, rows in sections for row in rows) for column in (0, 1))
    for title, rows in sections:
        table = Table.grid(padding=(0, 2))
        table.add_column(width=names, no_wrap=True)
        table.add_column(width=states, no_wrap=True)
        table.add_column(overflow="fold")
        for name, state, text in rows:
            table.add_row(Text(name), Text(state, style=_STYLES.get(state, "bold red")), Text(text))
        console.print(Text(title, style="bold"))
        console.print(Padding(table, (0, 0, 0, 2)))


def _sections(answer: Mapping[str, Any]) -> Iterator[tuple[str, list[Row]]]:
    for part, findings in groupby(answer["findings"], key=lambda finding: finding["part"]):
        yield part, [(printable(finding["name"]), finding["state"], printable(_text(finding))) for finding in findings]
    rows = [(one["name"], "yes" if one["works"] else "no", printable(one["note"])) for one in answer["verdicts"]]
    yield "what works here", rows


def _text(finding: Mapping[str, str]) -> str:
    """`found`; where it is not as it should be, also what it is needed for and the remedy."""
    if finding["state"] == "ok":
        return finding["found"]
    needed = f"needed for {finding['needed_for']}" if finding["needed_for"] else ""
    known = "; ".join(filter(None, [finding["found"], needed]))
    return ": ".join(filter(None, [known, finding["remedy"]]))
