"""What of a run is done and what can be done next, from its files alone; needs no engine.

A stage is done when its files say so; nothing else remembers it, so a killed run goes on where its files end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError
from btm_scale.forest.branch import require_parents
from btm_scale.forest.expert import is_finished
from btm_scale.forest.scores import all_texts, missing_scores
from btm_scale.launch.supervise import GroupCommand
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import model_names, training_job, training_stages
from btm_scale.train.progress import ModelProgress, read_progress

# What may change between two calls on one folder: it decides how a run goes on, not what its models are.
_FREE = (
    "launch",
    "checkpoint",
    "health",
    "profile",
    "baselines",
    "data.workers",
    "evaluate.averages",
    "evaluate.blocks",
    "evaluate.prior",
    "evaluate.posterior",
    "evaluate.tempering",
    "evaluate.top_k",
    "evaluate.top_k_per_token",
)


def open_run(config: RunConfig, run: RunDir) -> None:
    """Make the run's folder, or check that it is this config's, and save the config in it.

    Raises ConfigError if the folder holds another run: its models would not be what the config says. Raises
    ForestError if an expert is to branch from a model that does not exist.
    """
    if run.config.is_file():
        existing = RunConfig.load(run.config)
        free = (*_FREE, *_additions(existing, config))
        differing = [
            line
            for path, line in _differences(existing.model_dump(mode="json"), config.model_dump(mode="json"))
            if not any(path == part or path.startswith(f"{part}.") for part in free)
        ]
        if differing:
            raise ConfigError(
                f"{run.root} holds a run of another config; it differs in:\n"
                + "\n".join(f"  {line}" for line in differing)
                + "\nUse another --out, or delete that folder."
            )
    require_parents(config, run, model_names(config))
    config.save(run.config)


def is_done(config: RunConfig, run: RunDir, model: str) -> bool:
    """Whether a model is trained, exported and scored."""
    return is_finished(run.model(model)) and not missing_scores(config, run, model, all_texts(config))


def next_models(config: RunConfig, run: RunDir) -> list[str]:
    """The models that can be trained now: the first stage that isn't done, without those of it that are."""
    for stage in training_stages(config):
        todo = [model for model in stage if not is_done(config, run, model)]
        if todo:
            return todo
    return []


def training_commands(config: RunConfig, run: RunDir, models: Sequence[str]) -> list[GroupCommand]:
    """A group for each of the models that lack anything of it, in the order given."""
    commands = []
    for model in models:
        if not is_done(config, run, model):
            job = training_job(config, model)
            arguments = ("train", str(run.config), "--model", model, "--out", str(run.root))
            work = float(job.steps * job.sequences)
            layout = job.layout
            commands.append(GroupCommand(model, layout.ranks, arguments, run.log(model), layout.colocated, work))
    return commands


def progress(config: RunConfig, run: RunDir, states: dict[str, str]) -> list[ModelProgress]:
    """How far each model is, in the run's order."""
    return [
        read_progress(run, model, training_job(config, model).steps, state=states[model])  # type: ignore[arg-type]
        for model in model_names(config)
        if model in states
    ]


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
