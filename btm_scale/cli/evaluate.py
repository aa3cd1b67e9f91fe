"""Verbs that score models, and compare methods by the scores."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from btm_scale.cli.named_numbers import named_numbers
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
from btm_scale.errors import UserError
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


@verb(app, "mixture", section=_SECTION)
def mixture(
    run: RunFolder,
    *,
    targets: Annotated[
        list[str],
        several(
            "--target",
            "NAME=WEIGHT,...",
            "Minimize the weighted mean perplexity of these domains.  [default: all with an expert, equally]",
        ),
    ],
    texts: Annotated[
        list[Path], several("--text", "FILE", "Minimize the perplexity of this text file instead. May be repeated.")
    ],
    keep: Annotated[
        list[str],
        several("--keep", "NAME=RATIO,...", "Limit a domain's perplexity to this many times the seed LM's."),
    ],
    runs: Annotated[
        int | None,
        option(
            "--runs",
            "N",
            "Number of weighted averages to measure.  [default: 24, and with more than 5 models what the laws need]",
            min=1,
        ),
    ] = None,
    split: Annotated[str, one_of("--split", "split", ("dev", "test"), "Split of the domains to measure on.")] = "dev",
    random_seed: RandomSeed = 0,
    device: Device = None,
    dry_run: Annotated[bool, flag("--dry-run", "Report what would be measured and how long it would take.")] = False,
) -> Answer:
    """Predict the best proportions of the domains in training data.

    A weighted average of the experts and the seed LM approximates a model trained on that mixture. Laws are fitted to
    the measured losses of such averages, and the predicted perplexity is minimized. The seed LM's weight is the
    fraction of replayed text.
    """
    from btm_scale.evaluate.ablate import file_text, run_texts
    from btm_scale.evaluate.mixture import choose_mixture
    from btm_scale.evaluate.mixture_choice import MixtureGoal
    from btm_scale.evaluate.mixture_runs import components, default_runs, drawn
    from btm_scale.forest.turns import using
    from btm_scale.model.hf_decoder import usable_device
    from btm_scale.report.mixture_table import Countdown, cost_sentence, print_mixture
    from btm_scale.run.mixture_cost import mixture_cost

    if targets and texts:
        raise UserError("--target and --text exclude each other: --text files are the targets. Give one of them.")
    config, run_dir = opened(run)
    names = components(run_dir)
    files = {path.name: file_text(config, run_dir, path) for path in texts}
    if len(files) < len(texts):
        raise UserError("Two --text files have the same name. Rename one of them, or concatenate them.")
    trained = [name for name in config.expert_domains if name in names] or list(config.expert_domains)
    chosen = named_numbers("--target", targets) or dict.fromkeys(files or trained, 1.0)
    goal = MixtureGoal(chosen, named_numbers("--keep", keep))
    goal.require_valid(names)
    domains = dict.fromkeys([*(() if files else chosen), *goal.keep])
    if clash := [name for name in domains if name in files]:
        raise UserError(f"'{clash[0]}' is the name of a domain and of a --text file. Rename the file.")
    measured_on = files | (run_texts(config, run_dir, list(domains), split) if domains else {})
    mixtures = drawn(names, runs or default_runs(len(names)), random_seed)
    place = usable_device(device)
    cost = mixture_cost(run_dir, measured_on, mixtures, place)
    if dry_run:
        return Answer(cost.document(), lambda: say(cost_sentence(cost.document())))
    logger.info("%s", cost_sentence(cost.document()))
    with using(run_dir):
        answer = choose_mixture(
            config,
            run_dir,
            measured_on,
            mixtures,
            goal,
            random_seed=random_seed,
            device=place,
            on_mixture=Countdown(cost.to_measure).log,
        )
    logger.info("Wrote %s. To show it on the page: btm-scale report %s", run_dir.mixture, run_dir.root)

    def show() -> None:
        from rich.console import Console

        print_mixture(answer, Console())

    return Answer(answer.model_dump(), show)
