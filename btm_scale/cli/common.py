"""What several verbs share: opening a run, and showing an answer."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from btm_scale.run.launcher_table import LAUNCHERS

if TYPE_CHECKING:
    from btm_scale.config.run import RunConfig
    from btm_scale.evaluate.results import Results
    from btm_scale.run_dir import RunDir

Answer = dict[str, Any]


def opened(options: argparse.Namespace) -> tuple[RunConfig, RunDir]:
    """The run in the folder that was given. Raises ConfigError if there is none."""
    from btm_scale.forest.open import open_folder

    return open_folder(options.run)


def is_rank(options: argparse.Namespace) -> bool:
    """Whether this process is a rank of a group that a launcher started."""
    become_rank = LAUNCHERS[options.launcher].become_rank
    if become_rank is not None:
        become_rank(os.environ)
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def say(text: str) -> None:
    """Tell a person; stdout is the answer's."""
    print(text, file=sys.stderr, flush=True)


def shown(options: argparse.Namespace, answer: Answer) -> Answer:
    """Print an answer as YAML, unless it is printed as JSON later."""
    if not options.json:
        from btm_scale.config.yaml import dump_text

        print(dump_text(answer), end="")
    return answer


def show_results(options: argparse.Namespace, results: Results) -> None:
    """Print a run's results as a table, unless they are printed as JSON later."""
    if not options.json:
        from rich.console import Console

        from btm_scale.report.results_table import print_results

        print_results(results, Console())
