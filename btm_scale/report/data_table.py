"""The token files of a run as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from btm_scale.report.fitting import Fitting
from btm_scale.report.quantities import amount, size
from btm_scale.report.summary import shorten
from btm_scale.util.terminal import printable

_SPLITS = ("train", "dev", "test")
_LONGEST_NAME = 28
# Columns after the domain's name: all of them, and fewer for a narrow terminal.
_COLUMNS = (
    ("documents", "text", *_SPLITS, "duplicates", "skipped lines"),
    ("documents", "text", *_SPLITS),
    _SPLITS,
)


def data_table(domains: Mapping[str, Mapping[str, Any]]) -> Fitting:
    """Return a row per domain: its documents and text, the tokens of each split, and what was left out."""
    return Fitting(tuple(_table(domains, columns) for columns in _COLUMNS))


def _table(domains: Mapping[str, Mapping[str, Any]], columns: tuple[str, ...]) -> Table:
    table = Table("domain", box=None, pad_edge=False)
    for name in columns:
        table.add_column(f"{name} tokens" if name == "train" else name, justify="right", no_wrap=True)
    for domain, facts in domains.items():
        splits = [facts[split] for split in _SPLITS]
        cells = {split: amount(counts["tokens"]) for split, counts in zip(_SPLITS, splits, strict=True)}
        cells |= {
            "documents": f"{sum(counts['documents'] for counts in splits):,}",
            "text": size(sum(counts["bytes"] for counts in splits)),
            "duplicates": f"{facts['duplicates']:,}",
            "skipped lines": f"{facts['skipped_lines']:,}",
        }
        table.add_row(Text(shorten(printable(domain), _LONGEST_NAME)), *(cells[name] for name in columns))
    return table
