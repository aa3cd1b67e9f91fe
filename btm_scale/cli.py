"""The btm-scale command: one function a verb, no logic; their arguments are in cli_parser.py.

Nothing heavy is imported before a verb needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from btm_scale.cli_parser import build_parser
from btm_scale.errors import GroupFailed, UserError

if TYPE_CHECKING:
    from btm_scale.config import RunConfig
    from btm_scale.forest.generation import Piece
    from btm_scale.run_dir import RunDir

Answer = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 on success, 2 on a user's mistake, 1 on any other failure."""
    options = build_parser(_VERBS).parse_args(arguments)
    _silence_megatron()
    try:
        answer = options.verb(options)
    except UserError as error:
        print(f"btm-scale: {error}", file=sys.stderr)
        sys.exit(2)
    except GroupFailed as error:
        print(f"btm-scale: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("btm-scale: interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    if options.json:
        print(json.dumps(answer, indent=2))


def demo(options: argparse.Namespace) -> Answer:
    """Run Branch-Train-Merge on text of this installation."""
    from btm_scale.demo import demo_config

    config, run = demo_config(options.out, options.set)
    return _run(options, config, run)


def run(options: argparse.Namespace) -> Answer:
    """Run every stage of a config that isn't done."""
    config, run_dir = _config_and_run(options)
    if options.launcher == "slurm":
        from btm_scale.slurm_run import submit_run

        return _show_lines(options, submit_run(config, run_dir, dry_run=options.dry_run, say=_say))
    if options.dry_run:
        from btm_scale.pipeline import dry_run

        return _show_lines(options, dry_run(config, run_dir))
    return _run(options, config, run_dir)


def prepare(options: argparse.Namespace) -> Answer:
    """Train the tokenizer and write the token files."""
    from btm_scale.data.prepare import prepare as prepare_data
    from btm_scale.pipeline import data_summary
    from btm_scale.run_state import open_run

    config, run_dir = _config_and_run(options)
    open_run(config, run_dir)
    prepare_data(config, run_dir)
    return _show_lines(options, data_summary(config, run_dir))


def train(options: argparse.Namespace) -> Answer:
    """Train, export and score models: those that are named, or all that can be trained next, side by side."""
    config, run_dir = _config_and_run(options)
    if _is_rank(options):
        from btm_scale.train.worker import train_as_rank

        [model] = options.model
        train_as_rank(config, run_dir, model)
    else:
        from btm_scale.run_state import next_models, open_run

        open_run(config, run_dir)
        options.model = options.model or next_models(config, run_dir)
        _train(options, config, run_dir)
    return {"models": {model: str(run_dir.model(model)) for model in options.model}}


def plan(options: argparse.Namespace) -> Answer:
    """Layout, memory, time and place of every group on a cluster that need not be there."""
    from btm_scale.config import RunConfig
    from btm_scale.launch.gpus import gpu_named
    from btm_scale.launch.plan import Cluster
    from btm_scale.planning import make_plan

    config = RunConfig.load(options.config, tuple(options.set))
    made = make_plan(config, Cluster(gpu_named(options.gpu), options.nodes, options.gpus_per_node))
    if not options.json:
        from rich.console import Console

        from btm_scale.report.plan_table import print_plan

        print_plan(made, Console())
    return made


def status(options: argparse.Namespace) -> Answer:
    """Show how far every model of a run is."""
    from btm_scale.report.live import live_table, print_progress, progress_as_json
    from btm_scale.status import failures, run_status, watch

    config, run_dir = _open(options)
    if options.watch:
        with live_table(quiet=options.json) as show:
            rows = watch(config, run_dir, show)
    else:
        rows = run_status(config, run_dir)
        if not options.json:
            print_progress(rows)
    failed = failures(rows, run_dir)
    if not options.json:
        for model, failure in failed.items():
            print(f"\n{model} failed: {failure}")
    return progress_as_json(rows) | {"failures": {model: str(failure) for model, failure in failed.items()}}


def discover(options: argparse.Namespace) -> Answer:
    """Cluster a text collection into domains of equal size (c-BTM)."""
    from btm_scale.data.discover import collection_of
    from btm_scale.data.discover import discover as find_domains

    collection, text_root = collection_of(options.collection, options.field)
    return _show_lines(options, find_domains(
        collection, text_root, options.out.resolve(), clusters=options.clusters, sample=options.sample,
        dimensions=options.dimensions, random_seed=options.random_seed,
    ))  # fmt: skip


def forest_list(options: argparse.Namespace) -> Answer:
    """List the experts of a run's forest."""
    from btm_scale.forest.forest import experts

    _, run_dir = _open(options)
    forest = {
        name: {"parents": {parent.name: parent.weight for parent in expert.parents}, "domains": expert.domains,
               "tokens": expert.tokens, "steps": expert.steps, "content_hash": expert.content_hash}
        for name, expert in experts(run_dir).items()
    }  # fmt: skip
    return _show_lines(options, {"experts": forest})


def forest_add(options: argparse.Namespace) -> Answer:
    """Copy a Hugging Face directory into the forest, and score it on every domain."""
    from btm_scale.forest.living import add_expert
    from btm_scale.pipeline import score_models

    config, run_dir = _open(options)
    name = options.name or options.directory.resolve().name
    expert = add_expert(config, run_dir, options.directory, name)
    score_models(config, run_dir, [name])
    return _show_lines(options, {"added": name, "content_hash": expert.content_hash})


def forest_remove(options: argparse.Namespace) -> Answer:
    """Take an expert out of the forest, with its scores and training states."""
    from btm_scale.growth import remove_from_forest

    config, run_dir = _open(options)
    remove_from_forest(config, run_dir, options.name)
    return _show_lines(options, {"removed": options.name})


def branch(options: argparse.Namespace) -> Answer:
    """Make the first weights of a new expert, and put it into the run's config for the next `run` to train."""
    from btm_scale.growth import branch_expert

    config, run_dir = _open(options)
    settings = {"replay": options.replay, "optimizer": options.optimizer, "schedule": options.schedule}
    begun = branch_expert(
        config, run_dir, options.name, _parents(options.parents), text=options.text, settings=settings
    )
    return _show_lines(options, {
        "expert": options.name, "parents": {parent.name: parent.weight for parent in begun.parents},
        "text": begun.domains, "first_weights": str(run_dir.first_weights(options.name)),
        "next": f"btm-scale run {run_dir.config} --out {run_dir.root}",
    })  # fmt: skip


def forest_lineage(options: argparse.Namespace) -> Answer:
    """Show which models every expert comes from, with weights."""
    from btm_scale.forest.living import lineage

    _, run_dir = _open(options)
    return _show_lines(options, {"parents": lineage(run_dir)})


def score(options: argparse.Namespace) -> Answer:
    """Score models on every domain that they lack."""
    config, run_dir = _open(options)
    if _is_rank(options):
        from btm_scale.train.worker import score_as_rank

        score_as_rank(config, run_dir, options.model, choose=options.soups)
        return {}
    from btm_scale.pipeline import score_models

    return _show_lines(options, {"scored": score_models(config, run_dir, options.model)})


def evaluate(options: argparse.Namespace) -> Answer:
    """Average, score the averages, and work out every method's perplexity."""
    from btm_scale.forest.results import evaluate as evaluate_run
    from btm_scale.launchers import launcher_named
    from btm_scale.pipeline import score_averages

    config, run_dir = _open(options)
    score_averages(config, run_dir, launcher_named(options.launcher, config))
    results = evaluate_run(config, run_dir)
    _print_results(options, results)
    return results


def report(options: argparse.Namespace) -> Answer:
    """Draw the page and print the table."""
    from btm_scale.forest.results import load_results
    from btm_scale.pipeline import report as draw

    config, run_dir = _open(options)
    results = load_results(run_dir)
    draw(config, run_dir, results)
    _print_results(options, results)
    return {"page": str(run_dir.report)}


def ablate(options: argparse.Namespace) -> Answer:
    """Rank mixtures of domains by the average of their experts' parameters."""
    from btm_scale.forest.ablate import ablate as measure
    from btm_scale.forest.ablate import choose_subsets, file_text, run_texts
    from btm_scale.forest.decoder import usable_device

    config, run_dir = _open(options)
    subsets = choose_subsets(run_dir, options.expert, most=options.subsets, random_seed=options.random_seed)
    texts = {path.name: file_text(config, run_dir, path) for path in options.text}
    if options.domain or not texts:
        texts |= run_texts(config, run_dir, options.domain, options.split)
    answer = measure(
        config, run_dir, texts, subsets, device=usable_device(options.device),
        on_subset=lambda subset, mean: _say(f"{' + '.join(subset)}: {mean:.2f}"),
    )  # fmt: skip
    if not options.json:
        from rich.console import Console

        from btm_scale.report.ablation_table import ablation_table

        Console().print(ablation_table(answer))
    return answer


def generate(options: argparse.Namespace) -> Answer:
    """Continue prompts with the forest, or with some of the run's models."""
    from dataclasses import asdict

    from btm_scale.forest.decoding import Sampling
    from btm_scale.forest.generate import Generator
    from btm_scale.forest.generation import prompts_of
    from btm_scale.forest.shelf import bytes_from_text

    config, run_dir = _open(options)
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
        prompts, max_tokens=options.max_tokens, stop=options.stop, random_seed=options.random_seed,
        batch=options.batch,
    ):  # fmt: skip
        if piece.whole is not None:
            made[piece.prompt] = asdict(piece.whole)
        if not options.json:
            _show_piece(prompts, piece)
    return {"method": generator.method, "generations": [made[number] for number in range(len(prompts))]}


def merge(options: argparse.Namespace) -> Answer:
    """Merge models into one."""
    from btm_scale.checkpoint.merge import merge as merge_models
    from btm_scale.checkpoint.mpi import started_by_mpi

    done = merge_models(
        options.output,
        [_weighted_path(text) for text in options.inputs],
        method=options.method,
        parameters=dict(_setting(text) for text in options.parameter),
        base=options.base,
        dtype=options.dtype,
        jobs=options.jobs,
        seed=options.seed,
        mpi=started_by_mpi(),
    )
    return _show_lines(options, {
        "output": str(done.output), "method": done.method, "tensors": done.tensors, "parameters": done.parameters,
        "content_hash": done.content_hash, "seconds": round(done.seconds, 2),
    })  # fmt: skip


def convert(options: argparse.Namespace) -> Answer:
    """Write a checkpoint in another format or tensor layout."""
    from btm_scale.checkpoint.convert import convert as convert_checkpoint

    made = convert_checkpoint(
        options.source,
        options.target,
        to=options.to,
        tensor=options.tensor,
        dtype=options.dtype,
        verify=options.verify,
    )
    return _show_lines(options, {"output": str(made), "format": options.to, "verified": options.verify})


def inspect(options: argparse.Namespace) -> Answer:
    """Say what a checkpoint is, and what it can be turned into."""
    from dataclasses import asdict

    from btm_scale.checkpoint.inspect import inspect as inspect_checkpoint

    found = asdict(inspect_checkpoint(options.path))
    lists = {name: list(found[name]) for name in ("converts_to", "tensor_degrees")}
    return _show_lines(options, found | {"path": str(options.path)} | lists)


def _run(options: argparse.Namespace, config: RunConfig, run_dir: RunDir) -> Answer:
    from btm_scale.launchers import launcher_named
    from btm_scale.pipeline import run_all
    from btm_scale.report.live import live_table

    launcher = launcher_named(options.launcher, config)
    with live_table(quiet=options.json) as show:
        results = run_all(config, run_dir, on_progress=show, say=_say, launcher=launcher)
    _print_results(options, results)
    _say(f"The page is {run_dir.report}")
    return results


def _train(options: argparse.Namespace, config: RunConfig, run_dir: RunDir) -> None:
    from btm_scale.launchers import launcher_named, train_under_mpi

    if options.launcher == "mpi":
        train_under_mpi(config, run_dir, options.model)
        return
    from btm_scale.pipeline import run_training
    from btm_scale.report.live import live_table

    with live_table(quiet=options.json) as show:
        launcher = launcher_named(options.launcher, config)
        run_training(config, run_dir, options.model, on_progress=show, launcher=launcher)


def _config_and_run(options: argparse.Namespace) -> tuple[RunConfig, RunDir]:
    from btm_scale.config import RunConfig
    from btm_scale.run_dir import RunDir

    config = RunConfig.load(options.config, tuple(options.set))
    return config, RunDir((options.out or Path("runs") / config.name).resolve())


def _open(options: argparse.Namespace) -> tuple[RunConfig, RunDir]:
    from btm_scale.config import RunConfig
    from btm_scale.errors import ConfigError
    from btm_scale.run_dir import RunDir

    run_dir = RunDir(options.run.resolve())
    if not run_dir.config.is_file():
        raise ConfigError(
            f"{options.run} is no run: it has no run.yaml; give the folder that `btm-scale run` made"
        )
    return RunConfig.load(run_dir.config), run_dir


def _parents(text: str) -> str | dict[str, float]:
    if "=" not in text:
        return text if text in ("seed", "nearest", "posterior") else {text: 1.0}
    pairs = [part.partition("=") for part in text.split(",")]
    try:
        return {name: float(weight) for name, _, weight in pairs}
    except ValueError:
        raise UserError(
            f"--from {text}: expected seed, nearest, posterior, or weights such as A=0.3,B=0.7"
        ) from None


def _weighted_path(text: str) -> tuple[Path, float]:
    path, sign, weight = text.rpartition("=")
    if not sign:
        return Path(text), 1.0
    try:
        return Path(path), float(weight)
    except ValueError:
        raise UserError(f"'{text}': the weight after '=' must be a number, such as DIR=0.5") from None


def _silence_megatron() -> None:
    # At every import, in every process, Megatron-core says which optional packages it does without.
    for message in ("Transformer Engine and Apex", "Apex is not installed"):
        warnings.filterwarnings("ignore", message)
        others = os.environ.get("PYTHONWARNINGS")
        if message not in (others or ""):
            os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [others, f"ignore:{message}"]))


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise UserError(f"--parameter {text}: expected NAME=NUMBER, such as density=0.5") from None


def _is_rank(options: argparse.Namespace) -> bool:
    if options.launcher == "slurm":
        from btm_scale.launch.ranks import become_slurm_rank

        become_slurm_rank(os.environ)
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show_lines(options: argparse.Namespace, answer: Answer) -> Answer:
    if not options.json:
        import yaml

        print(yaml.safe_dump(answer, sort_keys=False, allow_unicode=True), end="")
    return answer


def _show_piece(prompts: Sequence[str], piece: Piece) -> None:
    """One prompt's text as it comes; of several, each continuation when it is whole."""
    if len(prompts) == 1:
        print(piece.text, end="\n" if piece.whole else "", flush=True)
    elif piece.whole:
        print(f"--- {piece.whole.prompt}\n{piece.whole.text}", flush=True)


def _print_results(options: argparse.Namespace, results: Answer) -> None:
    if not options.json:
        from rich.console import Console

        from btm_scale.report.tables import print_results

        print_results(results, Console())


_VERBS = {
    "demo": demo,
    "run": run,
    "prepare": prepare,
    "train": train,
    "plan": plan,
    "status": status,
    "discover": discover,
    "forest list": forest_list,
    "forest add": forest_add,
    "branch": branch,
    "forest remove": forest_remove,
    "forest lineage": forest_lineage,
    "score": score,
    "evaluate": evaluate,
    "report": report,
    "ablate": ablate,
    "generate": generate,
    "merge": merge,
    "convert": convert,
    "inspect": inspect,
}


if __name__ == "__main__":
    main()
