"""Tables that fit the terminal: of several versions of a table, the first whose rows do not wrap."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table

_UNLIMITED = 10_000


@dataclass(frozen=True)
class Fitting:
    """Versions of a table, the most complete first. It is drawn as the first that fits, or as the last."""

    versions: tuple[Table, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        fitting = (table for table in self.versions if width(console, table) <= options.max_width)
        yield next(fitting, self.versions[-1])

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, options.max_width)


def width(console: Console, table: Table) -> int:
    """Return the width of a table that nothing limits, in columns."""
    # Measured without a limit; otherwise every table would be cut to the terminal's width.
    return console.measure(table, options=console.options.update(width=_UNLIMITED)).maximum


def first_fitting(versions: Iterable[Table]) -> Fitting:
    """Return a table that is drawn as the first of these versions that fits."""
    return Fitting(tuple(versions))
