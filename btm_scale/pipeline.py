"""The stages of a run and their order: what is done, what is next, what may run side by side.

A stage is done when its files say so; nothing else remembers it, so a killed run goes on where its files end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from btm_scale.config import RunConfig
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.data.prepare import prepare, require_text
from btm_scale.errors import ConfigError
from btm_scale.forest.averages import GREEDY, average_texts, averages_of, write_averages
from btm_scale.forest.expert import is_finished, read_expert
from btm_scale.forest.forest import experts
from btm_scale.forest.results import evaluate
from btm_scale.forest.scoring import all_texts, missing_scores
from btm_scale.forest.soup import soups
from btm_scale.launch.local import LocalPool
from btm_scale.launch.supervise import GroupCommand, OnPoll, run_groups_in
from btm_scale.report.page import write_page
from btm_scale.report.progress import ModelProgress, read_progress
from btm_scale.run_dir import SEED, RunDir
from btm_scale.train.job import model_names, training_job
from btm_scale.train.metrics import read_metrics
from btm_scale.train.stages import training_stages

# What may change between two calls on one folder: it decides how a run goes on, not what its models are.
_FREE = (
    "launch",
    "checkpoint",
    "health",
    "profile",
    "baselines",
    "data.workers",
    "evaluate.prior",
    "evaluate.posterior",
    "evaluate.tempering",
    "evaluate.top_k",
)

Progress = Callable[[Sequence[ModelProgress]], None]
Say = Callable[[str], None]
# Runs groups, as many side by side as there is room for; see launch.supervise.run_groups_in.
Launcher = Callable[[Sequence[GroupCommand], OnPoll], None]


@dataclass(frozen=True)
class Placement:
    """How groups share this machine. It follows from the config alone, so that a run that was interrupted goes on with
    the same number of threads, and so with the same bits."""

    slots: int
    threads: int  # of one rank


def open_run(config: RunConfig, run: RunDir) -> None:
    """Make the run's folder, or check that it is this config's, and save the config in it.

    Raises ConfigError if the folder holds another run: its models would not be what the config says.
    """
    if run.config.is_file():
        existing = RunConfig.load(run.config)
        differing = [
            line
            for path, line in _differences(existing.model_dump(mode="json"), config.model_dump(mode="json"))
            if not path.startswith((*_FREE, *_additions(existing, config)))
        ]
        if differing:
            raise ConfigError(
                f"{run.root} holds a run of another config; it differs in:\n"
                + "\n".join(f"  {line}" for line in differing)
                + "\nUse another --out, or delete that folder."
            )
    config.save(run.config)


def run_all(
    config: RunConfig, run: RunDir, *, on_progress: Progress, say: Say, launcher: Launcher | None = None
) -> dict[str, Any]:
    """Every stage that isn't done, from text to page; returns the results. Groups run on this machine by default."""
    open_run(config, run)
    say("text -> token files")
    prepare(config, run)
    # A domain that was added since is new to every model that is finished already.
    finished = [*model_names(config), *added_experts(config, run)]
    finished = [model for model in finished if is_finished(run.model(model))]
    if finished:
        score_models(config, run, finished, launcher)
    for stage in training_stages(config):
        todo = [model for model in stage if not is_done(config, run, model)]
        if todo:
            say(f"training {', '.join(todo)}")
        run_training(config, run, stage, on_progress=on_progress, launcher=launcher)
    say("averaging and scoring")
    score_averages(config, run, launcher)
    results = evaluate(config, run)
    report(config, run, results)
    return results


def next_models(config: RunConfig, run: RunDir) -> list[str]:
    """The models that can be trained now: the first stage that isn't done, without those of it that are."""
    for stage in training_stages(config):
        todo = [model for model in stage if not is_done(config, run, model)]
        if todo:
            return todo
    return []


def placement(config: RunConfig, models: Sequence[str]) -> Placement:
    """How the groups of one stage share the machine's cores."""
    cores = len(os.sched_getaffinity(0))
    ranks = max(training_job(config, model).group.ranks for model in models)
    slots = config.launch.local.slots or max(1, cores // ranks)
    slots = min(slots, len(models))
    return Placement(slots, max(1, cores // (slots * ranks)))


def training_commands(config: RunConfig, run: RunDir, models: Sequence[str]) -> list[GroupCommand]:
    """A group for each of the models that lack anything of it, in the order given."""
    commands = []
    for model in models:
        if not is_done(config, run, model):
            job = training_job(config, model)
            arguments = ("train", str(run.config), "--model", model, "--out", str(run.root))
            work = float(job.steps * job.sequences)
            group = job.group
            commands.append(GroupCommand(model, group.ranks, arguments, run.log(model), group.tensor, work))
    return commands


def run_training(
    config: RunConfig,
    run: RunDir,
    models: Sequence[str],
    *,
    on_progress: Progress,
    launcher: Launcher | None = None,
) -> None:
    """Train, export and score the models that lack anything of it."""
    launcher = launcher or _local(placement(config, models))
    commands = training_commands(config, run, models)
    todo = [command.name for command in commands]
    done = {model: "done" for model in models if model not in todo}

    def poll(states: dict[str, str]) -> None:
        on_progress(progress(config, run, done | states))

    try:
        launcher(commands, poll)
    finally:
        on_progress(progress(config, run, {model: "done" if is_done(config, run, model) else "failed"
                                           for model in models}))  # fmt: skip


def progress(config: RunConfig, run: RunDir, states: dict[str, str]) -> list[ModelProgress]:
    """How far each model is, in the run's order."""
    return [
        read_progress(run, model, training_job(config, model).steps, state=states[model])  # type: ignore[arg-type]
        for model in model_names(config)
        if model in states
    ]


def score_models(
    config: RunConfig, run: RunDir, models: Sequence[str], launcher: Launcher | None = None
) -> list[str]:
    """Score those of the models (default: every finished one) that lack scores; returns their names."""
    for model in models:
        read_expert(run.model(model))
    averages = average_texts(config)
    known = [*model_names(config), *added_experts(config, run), *averages]
    names = models or [name for name in known if is_finished(run.model(name))]
    todo = [
        name for name in names if missing_scores(config, run, name, averages.get(name) or all_texts(config))
    ]
    if todo:
        _run_scoring(config, run, tuple(part for name in todo for part in ("--model", name)), launcher)
    return todo


def added_experts(config: RunConfig, run: RunDir) -> list[str]:
    """The experts of the forest that this run's config doesn't train."""
    return [name for name in experts(run) if name not in config.expert_domains]


def score_averages(config: RunConfig, run: RunDir, launcher: Launcher | None = None) -> None:
    """Merge the averages, and score each on the domains that it serves."""
    if GREEDY in averages_of(config, run) and soups(config, run) is None:
        _run_scoring(config, run, ("--soups",), launcher)
    score_models(config, run, write_averages(config, run), launcher)


def _run_scoring(
    config: RunConfig, run: RunDir, arguments: tuple[str, ...], launcher: Launcher | None
) -> None:
    """One group that runs `btm-scale score` on the run."""
    group = config.group
    command = GroupCommand(
        "score", group.ranks, ("score", str(run.root), *arguments), run.log("score"), group.tensor
    )
    launcher = launcher or _local(placement(config, [SEED]))
    launcher([command], lambda states: None)


def report(config: RunConfig, run: RunDir, results: dict[str, Any]) -> None:
    """Draw the page."""
    curves = {model: read_metrics(run.metrics(model)) for model in model_names(config)}
    write_page(config, results, {model: curve for model, curve in curves.items() if curve}, run.report)


def dry_run(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """What a run would do: its models, their steps, batches and layouts. Checks every text path; writes nothing."""
    files = require_text(config)
    jobs = {}
    for stage in training_stages(config):
        place = placement(config, stage)
        for model in stage:
            job = training_job(config, model)
            group = job.group
            jobs[model] = {
                "parents": job.branch.parents if job.branch is not None else None,
                "steps": job.steps,
                "batch": f"{job.sequences} x {config.budget.sequence_length} tokens",
                "layout": f"tensor {group.tensor} x data {group.data}, ZeRO {group.zero}, {group.precision}",
                "at_a_time": place.slots,
                "done": is_finished(run.model(model)),
            }
    rows = config.tokenizer.vocab_size if config.tokenizer.path is None else None
    shape = config.model.shape(rows or 1, config.budget.sequence_length)
    return {
        "run": str(run.root),
        "parameters": shape.parameters if rows else "known with the tokenizer",
        "text": {name: {"files": len(found), "bytes": sum(file.path.stat().st_size for file in found)}
                 for name, found in files.items()},
        "models": jobs,
    }  # fmt: skip


def data_summary(config: RunConfig, run: RunDir) -> dict[str, Any]:
    """Documents, tokens and bytes of every domain's splits, with what was skipped."""
    summary = {}
    for name in config.all_domains:
        made = Fingerprint.load(run, name)
        summary[name] = {split: counts.model_dump() for split, counts in made.splits.items()} | {
            "skipped_lines": made.skipped_lines,
            "duplicates": made.duplicates,
        }
    return {"data": str(run.data), "domains": summary}


def is_done(config: RunConfig, run: RunDir, model: str) -> bool:
    """Whether a model is trained, exported and scored."""
    return is_finished(run.model(model)) and not missing_scores(config, run, model, all_texts(config))


def _local(place: Placement) -> Launcher:
    def run_here(commands: Sequence[GroupCommand], on_poll: OnPoll) -> None:
        run_groups_in(LocalPool(place.slots, place.threads), commands, on_poll)

    return run_here


def _additions(existing: RunConfig, config: RunConfig) -> list[str]:
    """Paths in the YAML of domains that only one of two configs has and that nothing trained before depends on."""
    added = existing.added_domains.keys() ^ config.added_domains.keys()
    novel = existing.novel_domains.keys() ^ config.novel_domains.keys()
    paths = [f"{section}.{name}" for name in sorted(added) for section in ("added_domains", "experts")]
    return paths + [f"novel_domains.{name}" for name in sorted(novel)]


def _differences(one: Any, other: Any, path: str = "") -> list[tuple[str, str]]:
    """(path, sentence) of every value in which two configs differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for key in dict.fromkeys([*one, *other]):
            found += _differences(one.get(key), other.get(key), f"{path}.{key}" if path else str(key))
        return found
    return [] if one == other else [(path, f"{path}: {one} there, {other} here")]
