"""How answers that several verbs give are shown to a person."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btm_scale.cli.verb import say

if TYPE_CHECKING:
    from btm_scale.evaluate.results import Results


def show_jobs(jobs: Mapping[str, Any], run: Path, *, dry_run: bool) -> None:
    """Print what `run` wrote for SLURM, and what it submitted."""
    if dry_run:
        say(f"wrote the scripts of {', '.join(jobs['scripts'])} to {run / 'slurm'}; submitted nothing")
    elif jobs["submitted"]:
        say(f"submitted {', '.join(f'{name} ({number})' for name, number in jobs['submitted'].items())}")
        say(f"Follow the jobs with: btm-scale status {shlex.quote(str(run))} --watch")
    else:
        say("submitted nothing: every job is completed or in the queue")


def show_results(results: Results, page: Path | None = None) -> None:
    """Print a run's results as a table, and where its page is."""
    from rich.console import Console

    from btm_scale.report.results_table import print_results

    print_results(results, Console())
    if page is not None:
        say(f"The page is {page}")
