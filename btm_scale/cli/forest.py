"""Verbs of the forest: which experts there are, and what a new one starts from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from btm_scale.cli.commands import Verbs, VerbWithWords
from btm_scale.cli.options import (
    Device,
    RandomSeed,
    RunFolder,
    argument,
    models_of_run,
    one_of,
    opened,
    option,
    several,
)
from btm_scale.cli.verb import Answer, Document, already_complete, say, verb
from btm_scale.errors import UserError

logger = logging.getLogger(__name__)

app = typer.Typer()
_SECTION = "Experts"
# As forest/routers.py has them, which imports NumPy.
ROUTERS = ("fitted", "fitted-routed", "embedding", "hidden", "random")
forest = typer.Typer(
    help="List, add, remove and trace the experts of a run.", no_args_is_help=True, rich_markup_mode=None
)


@verb(app, "discover", section=_SECTION)
def discover(
    collection: Annotated[
        list[Path], argument("CONFIG|PATH...", "A run's YAML, whose domains are pooled, or text files and globs.")
    ],
    *,
    clusters: Annotated[int, option("--clusters", "K", "Number of domains to form.")],
    out: Annotated[Path, option("--out", "DIR", "Folder to create for the domains' text.")],
    field: Annotated[str, option("--field", "NAME", "Field of .jsonl and .parquet rows that has the text.")] = "text",
    sample: Annotated[int, option("--sample", "N", "Number of documents that the clusters are fitted to.")] = 20_000,
    dimensions: Annotated[int, option("--dimensions", "N", "SVD dimensions of the document embeddings.")] = 100,
    random_seed: RandomSeed = 0,
) -> Document:
    """Cluster text into domains of equal size (c-BTM).

    The domains' text and a YAML section that lists them are written to the folder.
    """
    from btm_scale.data.discover import collection_of
    from btm_scale.data.discover import discover as find_domains
    from btm_scale.report.encoding_bar import encoding_bars

    with encoding_bars(quiet=not logger.isEnabledFor(logging.INFO)) as show_progress:
        answer = find_domains(
            collection_of(collection, field),
            out.resolve(),
            clusters=clusters,
            sample=sample,
            dimensions=dimensions,
            random_seed=random_seed,
            on_progress=show_progress,
        )
    return already_complete(answer, str(out)) if "already_complete" in answer else answer


@verb(forest, "list")
def forest_list(run: RunFolder) -> Answer:
    """List the experts with their parents, domains and tokens."""
    from btm_scale.forest.forest import experts, no_expert

    _, run_dir = opened(run)
    forest = experts(run_dir)
    listed: dict[str, dict[str, dict[str, Any]]] = {
        "experts": {
            name: {
                "parents": {parent.name: parent.weight for parent in expert.parents},
                "domains": expert.domains,
                "tokens": expert.tokens,
                "steps": expert.steps,
                "content_hash": expert.content_hash,
            }
            for name, expert in forest.items()
        }
    }

    def show() -> None:
        from rich.console import Console

        from btm_scale.report.forest_table import forest_table

        if forest:
            Console().print(forest_table(listed["experts"]))
        else:
            say(no_expert(run_dir))

    return Answer(listed, show)


@verb(forest, "add")
def forest_add(
    run: RunFolder,
    directory: Annotated[
        Path, argument("DIRECTORY", "A Hugging Face model directory. The model must use the run's tokenizer.")
    ],
    *,
    name: Annotated[str | None, option("--name", "NAME", "The expert's name.  [default: the directory's]")] = None,
) -> Document:
    """Add a Hugging Face model as an expert.

    The model is copied into the forest and scored on every domain. Waits for commands that evaluate the run.
    """
    from btm_scale.run.pipeline import add_to_forest

    config, run_dir = opened(run)
    name = name or directory.resolve().name
    added = add_to_forest(config, run_dir, directory, name)
    answer = {"added": name, "content_hash": added.card.content_hash}
    return already_complete(answer, f"'{name}' of {run_dir.root}") if added.is_complete else answer


@verb(forest, "remove")
def forest_remove(
    run: RunFolder,
    name: Annotated[str, argument("NAME", "The expert.", autocompletion=models_of_run)],
) -> Document:
    """Remove an expert with its scores and checkpoints.

    A branch that is not trained yet can be removed too. Other experts are not changed. Refused while the run is
    training; waits for commands that evaluate it. Repeating it changes nothing.
    """
    from btm_scale.run.grow import remove_from_forest

    config, run_dir = opened(run)
    if remove_from_forest(config, run_dir, name):
        return {"removed": name}
    logger.info("'%s' was already removed from %s. Nothing was changed.", name, run_dir.root)
    return {"removed": name, "already_complete": True}


@verb(forest, "lineage")
def forest_lineage(run: RunFolder) -> Answer:
    """Show every expert's parents and their weights, up to the seed LM."""
    from btm_scale.forest.forest import lineage, no_expert

    _, run_dir = opened(run)
    parents = lineage(run_dir)
    return Answer({"parents": parents}, None if parents else lambda: say(no_expert(run_dir)))


app.add_typer(forest, name="forest", cls=Verbs, subcommand_metavar="ACTION ...", rich_help_panel=_SECTION)


@verb(app, "branch", section=_SECTION, cls=VerbWithWords)
def branch(
    run: RunFolder,
    *,
    name: Annotated[str, option("--name", "NAME", "Name of the expert, and of the domain that it is trained on.")],
    parents: Annotated[
        str,
        option(
            "--from",
            "seed|nearest|posterior|A=0.3,B=0.7",
            "Parents: the seed LM, the expert with the lowest loss on the domain's dev text, all experts "
            "weighted by the posterior of that text, or named models with weights.",
        ),
    ] = "seed",
    text: Annotated[list[Path], several("--text", "FILE...", "Text files of a domain that is new to the run.")],
    replay: Annotated[float, option("--replay", "FRACTION", "Fraction of text from the parents' domains.")] = 0.0,
    optimizer: Annotated[
        str,
        one_of(
            "--optimizer",
            "state of the optimizer",
            ("carried", "fresh"),
            "Start from the mean of the parents' moments, or from zero.",
        ),
    ] = "carried",
    schedule: Annotated[
        str,
        one_of(
            "--schedule",
            "learning-rate schedule",
            ("carried", "restarted"),
            "Continue the seed's learning-rate schedule, or warm up and decay again.",
        ),
    ] = "restarted",
    train: Annotated[
        str | None,
        one_of(
            "--train",
            "trained part",
            ("all", "mlp"),
            "Train everything, or the MLPs alone.  [default: as in the run's config, else all]",
        ),
    ] = None,
) -> Document:
    """Record the parents of a new expert, and add it to the run.

    The next `btm-scale run` trains the expert. The parents are settled once: an expert that joins or leaves the forest
    later does not change them. Repeat the command with other arguments to replace them before training begins.
    """
    from btm_scale.run.grow import branch_expert

    config, run_dir = opened(run)
    settings: dict[str, object] = {"replay": replay, "optimizer": optimizer, "schedule": schedule}
    settings |= {} if train is None else {"train": train}
    settled, former = branch_expert(config, run_dir, name, _parents(parents), text=text, settings=settings)
    if former is not None:
        logger.warning("%s had other parents or settings, which these replace", name)
    return {
        "expert": name,
        "parents": {parent.name: parent.weight for parent in settled.parents},
        "text": settled.domains,
        "replaced": {parent.name: parent.weight for parent in former.parents} if former is not None else None,
        "record": str(run_dir.branch(name)),
        "next": f"btm-scale run {run_dir.config} --out {run_dir.root}",
    }


@verb(app, "upcycle", section=_SECTION)
def upcycle(
    run: RunFolder,
    *,
    experts: Annotated[
        str | None, option("--experts", "A,B,...", "Use only these experts.  [default: all of the forest]")
    ] = None,
    without: Annotated[
        list[str], several("--without", "NAME", "Leave this expert out. May be repeated.", complete=models_of_run)
    ],
    top_k: Annotated[int, option("--top-k", "K", "Experts that compute each token.", min=1)] = 2,
    router: Annotated[
        str,
        one_of(
            "--router",
            "router",
            ROUTERS,
            "How the router is made: fitted-routed, in closed form, to the mixture's hidden states on its domains' dev "
            "text, as it routes; fitted, to those of each expert; embedding or hidden, the domains' mean embedding "
            "or mean hidden state; or random.",
            metavar="ROUTER",
        ),
    ] = "fitted-routed",
    shared_expert: Annotated[
        str | None,
        option(
            "--shared-expert",
            "MODEL",
            "Compute every token with the MLPs of this model too, such as seed; half of each layer's output is theirs.",
            autocompletion=models_of_run,
        ),
    ] = None,
    random_seed: RandomSeed = 0,
    jobs: Annotated[
        int | None,
        option("--jobs", "N", "Number of processes that merge.  [default: the number of cores]", min=1),
    ] = None,
    device: Device = None,
) -> Answer:
    """Make one mixture-of-experts model of the experts.

    Its experts are the MLPs of the forest's experts; the rest is their average. Nothing is trained. The model is
    written to RUN/moe, in place of a former one that was not trained either, and scored; `evaluate` compares it with
    every other method.
    """
    from btm_scale.model.hf_decoder import usable_device
    from btm_scale.run.mixture_recipe import Recipe
    from btm_scale.run.upcycle import upcycle as make

    config, run_dir = opened(run)
    chosen = tuple(name.strip() for name in experts.split(",")) if experts is not None else ()
    recipe = Recipe(chosen, tuple(without), top_k, router, random_seed, shared_expert)
    made = make(config, run_dir, recipe, device=usable_device(device), jobs=jobs)
    answer = {
        "model": str(run_dir.model("moe")),
        "experts": [parent.name for parent in made.card.parents],
        "top_k": top_k,
        "router": router,
        **({} if shared_expert is None else {"shared_expert": shared_expert}),
        "family": made.shape.family,
        "parameters": made.shape.parameters,
        "active_parameters": made.shape.active_parameters,
        "content_hash": made.card.content_hash,
    }
    if made.is_complete:
        return Answer(already_complete(answer, str(run_dir.model("moe"))))
    return Answer(answer)


def _parents(text: str) -> str | dict[str, float]:
    if "=" not in text:
        return text if text in ("seed", "nearest", "posterior") else {text: 1.0}
    parents: dict[str, float] = {}
    for name, _, weight in (part.partition("=") for part in text.split(",")):
        if name in parents:
            raise UserError(f"--from {text} names '{name}' twice. Give each parent one weight.")
        try:
            parents[name] = float(weight)
        except ValueError:
            raise UserError(
                f"--from {text}: expected seed, nearest, posterior, or weights such as A=0.3,B=0.7"
            ) from None
    return parents
