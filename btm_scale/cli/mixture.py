"""The verb that predicts the best proportions of the domains, or of replayed text."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from btm_scale.cli.named_numbers import named_numbers
from btm_scale.cli.options import Device, RandomSeed, RunFolder, flag, one_of, opened, option, several
from btm_scale.cli.verb import Answer, say, verb
from btm_scale.errors import UserError, unknown_name
from btm_scale.run_dir import SEED

logger = logging.getLogger(__name__)

app = typer.Typer()


@verb(app, "mixture", section="Evaluation")
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
        several(
            "--keep", "NAME=RATIO,...", "Limit the average's perplexity on a domain to this many times the seed LM's."
        ),
    ],
    runs: Annotated[
        int | None,
        option(
            "--runs",
            "N",
            "Number of weighted averages to measure.  [default: 24; what the laws need with more than 5 models, up to "
            "120; twice what a linear law needs with more than 59]",
            min=1,
        ),
    ] = None,
    split: Annotated[str, one_of("--split", "split", ("dev", "test"), "Split of the domains to measure on.")] = "dev",
    replay: Annotated[
        list[Path],
        several(
            "--replay",
            "RUN2",
            "Find the smallest share of other domains' text instead, from this run and others that trained the "
            "--target with other branch.replay. May be repeated.",
        ),
    ],
    tokens: Annotated[
        int | None,
        option(
            "--tokens", "N", "With --replay, training tokens of the expert.  [default: the most of the runs]", min=1
        ),
    ] = None,
    random_seed: RandomSeed = 0,
    device: Device = None,
    dry_run: Annotated[bool, flag("--dry-run", "Report what would be measured and how long it would take.")] = False,
) -> Answer:
    """Predict the best proportions of the domains in training data.

    Laws are fitted to the measured losses of weighted averages of the experts and the seed LM. From them follows the
    perplexity of a model trained on a mixture, which is minimized. The seed LM's weight is the fraction of replayed
    text. With --replay, laws of the share of other domains' text are fitted to the dev scores of
    finished runs.
    """
    if replay:
        if texts or dry_run or runs is not None:
            raise UserError(
                "--replay reads finished runs and measures nothing. Leave out --text, --runs and --dry-run."
            )
        return _critical_replay([run, *replay], named_numbers("--target", targets), keep, tokens, split)
    if tokens is not None:
        raise UserError("--tokens is for the laws of replay. Leave it out, or name runs with --replay.")
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


def _critical_replay(
    folders: list[Path], targets: dict[str, float], keep: list[str], tokens: int | None, split: str
) -> Answer:
    from btm_scale.evaluate.mixture_choice import MixtureGoal
    from btm_scale.evaluate.mixture_runs import save_replay
    from btm_scale.evaluate.replay import critical_replay

    limits = named_numbers("--keep", keep)
    if len(targets) != 1 or not limits:
        raise UserError(
            "--replay needs one --target, the expert, and --keep, the domains that replay must protect: "
            "--target law=1 --keep general=1.02"
        )
    opened_runs = [opened(folder) for folder in folders]
    roots = [run.root.resolve() for _, run in opened_runs]
    if twice := [root for i, root in enumerate(roots) if root in roots[:i]]:
        raise UserError(f"{twice[0]} is named twice. A law needs different runs: name each once, RUN included.")
    MixtureGoal(targets, limits).require_valid([SEED])
    [target] = targets
    config, first = opened_runs[0]
    if unknown := [name for name in (target, *limits) if name not in config.all_domains]:
        raise UserError(unknown_name("domain", unknown[0], config.all_domains))
    critical = critical_replay([run for _, run in opened_runs], target, limits, tokens, split)
    save_replay(first, critical)
    logger.info("Wrote %s. To show it on the page: btm-scale report %s", first.mixture, first.root)

    def show() -> None:
        from rich.console import Console

        from btm_scale.report.replay_table import print_replay

        print_replay(critical, Console())

    return Answer(critical.model_dump(), show)
