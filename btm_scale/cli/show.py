"""How answers that several verbs give are shown to a person."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from btm_scale.cli.verb import say

if TYPE_CHECKING:
    from btm_scale.evaluate.results import Results


def show_results(results: Results, page: Path | None = None) -> None:
    """Print a run's results as a table, and where its page is."""
    from rich.console import Console

    from btm_scale.report.results_table import print_results

    print_results(results, Console())
    if page is not None:
        say(f"The page is {page}")
