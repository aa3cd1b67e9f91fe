"""The experts of a forest as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from btm_scale.report.fitting import Fitting
from btm_scale.report.quantities import rounded
from btm_scale.report.summary import NOTHING, shorten
from btm_scale.util.terminal import printable

_DIGITS = 12  # of a content hash
# The longest name and list of weights, and the columns besides, for terminals of different widths.
_VERSIONS = (
    (28, 40, ("parents", "domains", "content hash")),
    (24, 24, ("parents", "domains", "content hash")),
    (20, 20, ("parents", "domains")),
    (16, 16, ("parents",)),
)


def forest_table(experts: Mapping[str, Mapping[str, Any]]) -> Fitting:
    """Return a row per expert: parents and domains with weights, tokens, steps, and the start of the content hash."""
    return Fitting(tuple(_table(experts, *version) for version in _VERSIONS))


def _table(
    experts: Mapping[str, Mapping[str, Any]], name_length: int, list_length: int, columns: Sequence[str]
) -> Table:
    table = Table(box=None, pad_edge=False)
    lists = [name for name in ("parents", "domains") if name in columns]
    with_hash = "content hash" in columns
    for name in ("expert", *lists):
        table.add_column(name, no_wrap=True)
    for name in ("tokens", "steps"):
        table.add_column(name, justify="right", no_wrap=True)
    if with_hash:
        table.add_column("content hash", no_wrap=True)
    for name, expert in experts.items():
        table.add_row(
            Text(shorten(printable(name), name_length)),
            *(Text(shorten(printable(_weights(expert[key])), list_length)) for key in lists),
            f"{expert['tokens']:,}",
            f"{expert['steps']:,}",
            *([expert["content_hash"][:_DIGITS]] if with_hash else []),
        )
    return table


def _weights(weights: Mapping[str, float]) -> str:
    """Return `seed` for one name of weight 1, otherwise `A=0.3 B=0.7`."""
    if len(weights) == 1 and next(iter(weights.values())) == 1:
        return next(iter(weights))
    return " ".join(f"{name}={rounded(weight, 2)}" for name, weight in weights.items()) or NOTHING
