"""Verbs of the forest: its members, what they are worth, and what they write."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btm_scale.cli.common import Answer, is_rank, opened, say, show_results, shown
from btm_scale.errors import UserError

if TYPE_CHECKING:
    from btm_scale.generate.request import Piece


def discover(options: argparse.Namespace) -> Answer:
    """Cluster a text collection into domains of equal size (c-BTM)."""
    from btm_scale.data.discover import collection_of
    from btm_scale.data.discover import discover as find_domains

    return shown(
        options,
        find_domains(
            collection_of(options.collection, options.field),
            options.out.resolve(),
            clusters=options.clusters,
            sample=options.sample,
            dimensions=options.dimensions,
            random_seed=options.random_seed,
        ),
    )


def forest_list(options: argparse.Namespace) -> Answer:
    """List the experts of a run's forest."""
    from btm_scale.forest.forest import experts

    _, run_dir = opened(options)
    forest = {
        name: {
            "parents": {parent.name: parent.weight for parent in expert.parents},
            "domains": expert.domains,
            "tokens": expert.tokens,
            "steps": expert.steps,
            "content_hash": expert.content_hash,
        }
        for name, expert in experts(run_dir).items()
    }
    return shown(options, {"experts": forest})


def forest_add(options: argparse.Namespace) -> Answer:
    """Copy a Hugging Face directory into the forest, and score it on every domain."""
    from btm_scale.forest.membership import add_expert
    from btm_scale.run.pipeline import score_models

    config, run_dir = opened(options)
    name = options.name or options.directory.resolve().name
    expert = add_expert(config, run_dir, options.directory, name)
    score_models(config, run_dir, [name])
    return shown(options, {"added": name, "content_hash": expert.content_hash})


def forest_remove(options: argparse.Namespace) -> Answer:
    """Take an expert out of the forest, with its scores and checkpoints, or a branch that is not trained yet."""
    from btm_scale.run.grow import remove_from_forest

    config, run_dir = opened(options)
    remove_from_forest(config, run_dir, options.name)
    return shown(options, {"removed": options.name})


def branch(options: argparse.Namespace) -> Answer:
    """Decide and record the parents of a new expert, and add it to the run's config for the next `run` to train.

    The parents are settled once: an expert that joins or leaves the forest later does not change them. Until the new
    expert has begun to train, other arguments replace its parents.
    """
    from btm_scale.run.grow import branch_expert

    config, run_dir = opened(options)
    settings = {"replay": options.replay, "optimizer": options.optimizer, "schedule": options.schedule}
    settled, former = branch_expert(
        config, run_dir, options.name, _parents(options.parents), text=options.text, settings=settings
    )
    if former is not None:
        say(f"{options.name} had other parents or settings, which these replace")
    return shown(
        options,
        {
            "expert": options.name,
            "parents": {parent.name: parent.weight for parent in settled.parents},
            "text": settled.domains,
            "replaced": {parent.name: parent.weight for parent in former.parents} if former is not None else None,
            "record": str(run_dir.branch(options.name)),
            "next": f"btm-scale run {run_dir.config} --out {run_dir.root}",
        },
    )


def forest_lineage(options: argparse.Namespace) -> Answer:
    """Show which models every expert comes from, with weights."""
    from btm_scale.forest.forest import lineage

    _, run_dir = opened(options)
    return shown(options, {"parents": lineage(run_dir)})


def score(options: argparse.Namespace) -> Answer:
    """Score models on every domain that they lack."""
    config, run_dir = opened(options)
    if is_rank(options):
        from btm_scale.run.worker import score_as_rank

        score_as_rank(config, run_dir, options.model, averages=options.averages)
        return {}
    from btm_scale.run.pipeline import score_models

    return shown(options, {"scored": score_models(config, run_dir, options.model)})


def evaluate(options: argparse.Namespace) -> Answer:
    """Average, score the averages, and work out every method's perplexity."""
    config, run_dir = opened(options)
    from btm_scale.evaluate.evaluate import evaluate as evaluate_run
    from btm_scale.run.launchers import launcher_named
    from btm_scale.run.pipeline import score_averages

    score_averages(config, run_dir, launcher_named(options.launcher, config))
    results = evaluate_run(config, run_dir)
    show_results(options, results)
    return results.document()


def report(options: argparse.Namespace) -> Answer:
    """Draw the page and print the table."""
    from btm_scale.evaluate.results import load_results
    from btm_scale.report.page import report as draw

    config, run_dir = opened(options)
    results = load_results(run_dir)
    draw(config, run_dir, results)
    show_results(options, results)
    return {"page": str(run_dir.report)}


def ablate(options: argparse.Namespace) -> Answer:
    """Rank mixtures of domains by the average of their experts' parameters."""
    from btm_scale.evaluate.ablate import ablate as measure
    from btm_scale.evaluate.ablate import choose_subsets, file_text, run_texts
    from btm_scale.model.hf_decoder import usable_device

    config, run_dir = opened(options)
    subsets = choose_subsets(run_dir, options.expert, most=options.subsets, random_seed=options.random_seed)
    texts = {path.name: file_text(config, run_dir, path) for path in options.text}
    if options.domain or not texts:
        texts |= run_texts(config, run_dir, options.domain, options.split)
    answer = measure(
        run_dir,
        texts,
        subsets,
        device=usable_device(options.device),
        on_subset=lambda subset, mean: say(f"{' + '.join(subset)}: {mean:.2f}"),
    )
    if not options.json:
        from rich.console import Console

        from btm_scale.report.results_table import ablation_table

        Console().print(ablation_table(answer))
    return answer


def generate(options: argparse.Namespace) -> Answer:
    """Continue prompts with the forest, or with some of the run's models."""
    from dataclasses import asdict

    from btm_scale.config.section import bytes_from_text
    from btm_scale.generate.generator import Generator
    from btm_scale.generate.sampling import Sampling

    config, run_dir = opened(options)
    prompts = prompts_of(options.prompt, options.prompts)
    generator = Generator.of_run(
        config,
        run_dir,
        models=options.model,
        prior=options.prior,
        route_top_k=options.route_top_k,
        domain=options.domain,
        method=options.method,
        posterior=options.posterior,
        sampling=Sampling(options.temperature, options.top_k, options.top_p),
        max_bytes=bytes_from_text(options.max_memory) if options.max_memory else None,
        device=options.device,
    )
    made = {}
    for piece in generator.stream(
        prompts,
        max_tokens=options.max_tokens,
        stop=options.stop,
        random_seed=options.random_seed,
        batch=options.batch,
    ):
        if piece.whole is not None:
            made[piece.prompt] = asdict(piece.whole)
        if not options.json:
            _show_piece(prompts, piece)
    return {"method": generator.method, "generations": [made[number] for number in range(len(prompts))]}


def prompts_of(given: Sequence[str], file: Path | None) -> list[str]:
    """The prompts given one by one and those of a file, one a line. Raises UserError if there are none."""
    from btm_scale.data.files import is_utf8

    prompts = list(given)
    if file is not None:
        try:
            prompts += file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"no prompts can be read from {file}: {error}; give a UTF-8 text, one prompt a line"
            ) from None
    if not prompts:
        raise UserError("nothing to continue; give --prompt TEXT or --prompts FILE")
    for prompt in prompts:
        if not is_utf8(prompt):
            raise UserError(f"the prompt {prompt!r} is not UTF-8; a tokenizer reads UTF-8 text")
    return prompts


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


def _show_piece(prompts: Sequence[str], piece: Piece) -> None:
    """One prompt's text as it comes; of several, each continuation when it is whole."""
    if len(prompts) == 1:
        print(piece.text, end="\n" if piece.whole else "", flush=True)
    elif piece.whole:
        print(f"--- {piece.whole.prompt}\n{piece.whole.text}", flush=True)
