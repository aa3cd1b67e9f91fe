"""What several verbs share: opening a run, and showing an answer."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btm_scale.config.run import RunConfig
    from btm_scale.evaluate.results import Results
    from btm_scale.run_dir import RunDir

Answer = dict[str, Any]


def opened(options: argparse.Namespace) -> tuple[RunConfig, RunDir]:
    """The run in the folder that was given. Raises ConfigError if there is none."""
    from btm_scale.config.run import RunConfig
    from btm_scale.errors import ConfigError
    from btm_scale.run_dir import RunDir

    run_dir = RunDir(options.run.resolve())
    if not run_dir.config.is_file():
        raise ConfigError(f"{options.run} is no run: it has no run.yaml; give the folder that `btm-scale run` made")
    return RunConfig.load(run_dir.config), run_dir


def is_rank(options: argparse.Namespace) -> bool:
    """Whether this process is a rank of a group that a launcher started."""
    if options.launcher == "slurm":
        from btm_scale.launch.ranks import become_slurm_rank

        become_slurm_rank(os.environ)
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def say(text: str) -> None:
    """Tell a person; stdout is the answer's."""
    print(text, file=sys.stderr, flush=True)


def shown(options: argparse.Namespace, answer: Answer) -> Answer:
    """Print an answer as YAML, unless it is printed as JSON later."""
    if not options.json:
        import yaml

        print(yaml.safe_dump(answer, sort_keys=False, allow_unicode=True), end="")
    return answer


def show_results(options: argparse.Namespace, results: Results) -> None:
    """Print a run's results as a table, unless they are printed as JSON later."""
    if not options.json:
        from rich.console import Console

        from btm_scale.report.results_table import print_results

        print_results(results, Console())
