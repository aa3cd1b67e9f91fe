"""Verbs that score models, and compare methods by the scores."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from btm_scale.cli.options import (
    Device,
    RandomSeed,
    RunFolder,
    flag,
    is_rank,
    launcher,
    models_of_run,
    one_of,
    opened,
    opened_in,
    option,
    several,
)
from btm_scale.cli.show import show_results
from btm_scale.cli.verb import Answer, say, verb
from btm_scale.run.launcher_table import LAUNCHERS, LOCAL, Starting

logger = logging.getLogger(__name__)

app = typer.Typer()
_SECTION = "Evaluation"
# Launchers whose ranks find their place in the environment of this process.
_OF_RANKS = [name for name, launcher in LAUNCHERS.items() if name == LOCAL or launcher.become_rank]


@verb(app, "score", section=_SECTION)
def score(
    run: RunFolder,
    *,
    models: Annotated[
        list[str],
        several(
            "--model",
            "NAME",
            "Score only this model. May be repeated.  [default: all that lack scores]",
            complete=models_of_run,
        ),
    ],
    launcher: Annotated[str, launcher(_OF_RANKS, "With slurm or env this process is a rank that was started.")] = LOCAL,
    # Both are for the ranks that `evaluate` and other verbs start; those verbs hold the lock and pass their config.
    averages: Annotated[bool, flag("--averages", "", hidden=True)] = False,
    config_file: Annotated[Path | None, option("--config", "FILE", "", hidden=True)] = None,
) -> Answer | None:
    """Compute the per-token log-probabilities of models.

    Each model is scored on every domain for which it has no scores yet.
    """
    if is_rank(launcher):
        from btm_scale.util.devices import hide_gpus_if_on_cpu

        config, run_dir = opened(run, config_file)
        hide_gpus_if_on_cpu(config.launch.device)
        from btm_scale.run.worker import score_as_rank

        score_as_rank(config, run_dir, models, averages=averages, in_turn=config_file is not None)
        return None
    from btm_scale.forest.turns import scoring
    from btm_scale.run.pipeline import score_models

    with opened_in(run, scoring) as (config, run_dir):
        scored = score_models(config, run_dir, models)
    return Answer(
        {"scored": scored},
        None
        if scored
        else lambda: say(
            f"Nothing to score: {'these models have' if models else 'every finished model has'} all scores."
        ),
    )


@verb(app, "evaluate", section=_SECTION)
def evaluate(
    run: RunFolder,
    *,
    launcher: Annotated[str, launcher(Starting(), "With slurm, srun starts them within this job.")] = LOCAL,
) -> Answer:
    """Compute every method's perplexity, from the scores.

    Missing averages are merged and scored first. Waits for commands that add, score or remove experts.
    """
    from btm_scale.forest.turns import evaluating
    from btm_scale.run.launchers import launcher_named
    from btm_scale.run.pipeline import evaluate_forest

    with opened_in(run, evaluating) as (config, run_dir):
        results = evaluate_forest(config, run_dir, launcher_named(launcher, config))
    return Answer(results.document(), lambda: show_results(results))


@verb(app, "report", section=_SECTION)
def report(run: RunFolder) -> Answer:
    """Write the page with tables and charts, and print the table."""
    from btm_scale.evaluate.readiness import require_evaluable
    from btm_scale.evaluate.results import load_results
    from btm_scale.report.page import report as write_report

    config, run_dir = opened(run)
    if not run_dir.results.is_file():
        require_evaluable(config, run_dir)  # names what is missing before an evaluation is possible
    results = load_results(run_dir)
    write_report(config, run_dir, results)
    return Answer({"page": str(run_dir.report)}, lambda: show_results(results))


@verb(app, "ablate", section=_SECTION)
def ablate(
    run: RunFolder,
    *,
    experts: Annotated[
        list[str],
        several("--expert", "NAME", "Use only this expert. May be repeated.  [default: all]", complete=models_of_run),
    ],
    domains: Annotated[
        list[str],
        several("--domain", "NAME", "Measure on this domain. May be repeated.  [default: all, unless --text is given]"),
    ],
    texts: Annotated[list[Path], several("--text", "FILE", "Measure on this text file. May be repeated.")],
    split: Annotated[
        str | None,
        one_of("--split", "split", ("dev", "test"), "Split of the domains.  [default: evaluate.split of the config]"),
    ] = None,
    subsets: Annotated[
        int, option("--subsets", "N", "Measure at most N subsets, drawn at random if there are more.")
    ] = 127,
    random_seed: RandomSeed = 0,
    device: Device = None,
) -> Answer:
    """Rank subsets of experts by the perplexity of their average.

    The ranking predicts which mixture of domains is worth training on.
    """
    from btm_scale.evaluate.ablate import ablate as measure
    from btm_scale.evaluate.ablate import choose_subsets, file_text, run_texts
    from btm_scale.forest.turns import using
    from btm_scale.model.hf_decoder import usable_device

    config, run_dir = opened(run)
    chosen = choose_subsets(run_dir, experts, most=subsets, random_seed=random_seed)
    measured = {path.name: file_text(config, run_dir, path) for path in texts}
    if domains or not measured:
        measured |= run_texts(config, run_dir, domains, split)
    with using(run_dir):
        ranking = measure(
            run_dir,
            measured,
            chosen,
            device=usable_device(device),
            on_subset=lambda subset, mean: logger.info("%s: %.2f", " + ".join(subset), mean),
        )

    def show() -> None:
        from rich.console import Console

        from btm_scale.report.results_table import ablation_table

        Console().print(ablation_table(ranking))

    return Answer(ranking, show)
