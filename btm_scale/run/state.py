"""Determine which stages of a run are completed and which can run next, from its files alone; needs no engine.

Nothing else records progress, so a run that was killed resumes from its files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from btm_scale.config.changes import Difference, differences
from btm_scale.config.experts import ExpertConfig
from btm_scale.config.run import RunConfig
from btm_scale.distributed.precision import ask_device
from btm_scale.errors import ConfigError, DataError, LaunchError, first_few
from btm_scale.forest.branch import require_parents
from btm_scale.forest.expert import is_finished
from btm_scale.forest.methods import check_names
from btm_scale.forest.scores import all_texts, missing_scores
from btm_scale.forest.turns import changing_config, current_config
from btm_scale.launch import slurm_commands, slurm_queue
from btm_scale.launch.local import require_gpus
from btm_scale.launch.shutdown import STOPPED
from btm_scale.launch.supervise import GroupCommand
from btm_scale.run.raised import RECORDED, require_checkpoints, with_earlier_budgets, with_recorded_budgets
from btm_scale.run_dir import SEED, RunDir
from btm_scale.train.jobs import is_trained, model_names, training_job, training_stages
from btm_scale.train.monitors import require_monitors
from btm_scale.train.progress import ModelProgress, State, read_progress
from btm_scale.util.devices import Gpus, usable_gpus
from btm_scale.util.locks import is_held
from btm_scale.util.rank_log import read_failure

logger = logging.getLogger(__name__)

_ADDED = "only what it adds is trained and scored"


def open_run(
    config: RunConfig, run: RunDir, *, trains_here: bool = False, reread: Callable[[], RunConfig] | None = None
) -> RunConfig:
    """Create the run's folder, or check that its config fits; save the config in it and return it.

    `precision: auto` becomes the precision recorded in the run. If there is none and the groups run on this machine
    (`trains_here`), it becomes the device's fast precision; otherwise the first group resolves it. `reread` returns the
    config again if it comes from the run's folder, where another command may have changed it since.

    Raises as `continued` does, and LaunchError if the groups run here and this device cannot train in one of their
    precisions; nothing is written then.
    """

    def opened(*, logs: bool) -> RunConfig:
        fitting = continued(reread() if reread else config, run)
        return on_this_device(fitting, run, logs=logs) if trains_here else fitting

    opened(logs=False)  # raises before anything is written
    require_pretrained(config, run)
    with changing_config(run):
        fitting = opened(logs=True)  # a precision or a branch may have been recorded since
        fitting.save(run.config)
    return fitting


def require_pretrained(config: RunConfig, run: RunDir, *, may_lack_weights: bool = False) -> None:
    """Raise CheckpointError if a pretrained model that is still to be read lacks weights or has others than its config.

    Raises ConfigError if the run's tokenizer does not fit it, and DataError if the tokenizer cannot be loaded or has no
    BOS token although `tokenizer.bos` is set.

    Reads names and shapes only. With `may_lack_weights`, a folder with config.json alone is logged, not refused: a dry
    run may come before the download.
    """
    from btm_scale.checkpoint.targets import require_trainable  # imports torch
    from btm_scale.data.adopt_tokenizer import require_bos
    from btm_scale.data.tokenizer import Tokenizer
    from btm_scale.data.tokenizer_fit import require_fit

    models = {SEED: config.model, **{name: own.model for name, own in config.experts.items() if own.model is not None}}
    for name, sizes in models.items():
        if sizes.pretrained is None or is_finished(run.model(name)):
            continue
        if may_lack_weights and _has_config_alone(sizes.pretrained):
            logger.warning("%s has no weights yet: only its config is checked", sizes.pretrained)
        else:
            require_trainable(sizes.pretrained)
        if config.tokenizer.path is not None and not run.tokenizer.is_dir():
            require_fit(sizes.pretrained, config.tokenizer.path, bos=config.tokenizer.bos)
    path = config.tokenizer.path
    if path is None or run.tokenizer.is_dir() or (may_lack_weights and _has_config_alone(path)):
        return
    tokenizer = Tokenizer.load(path)
    if config.tokenizer.bos:
        require_bos(tokenizer, path)


def _has_config_alone(directory: Path) -> bool:
    return directory.is_dir() and [path.name for path in directory.iterdir()] == ["config.json"]


def continued(config: RunConfig, run: RunDir) -> RunConfig:
    """Return the config as `compared` does. Raises ConfigError if a setting differs that may not, and for an expert
    that needs tokens and gets none."""
    config, changes = compared(config, run)
    _refuse(run, [one for one in changes if not one.is_allowed])
    if config.budget.seed_share == 1:  # only a run's recorded budgets say which experts take a step
        for name in config.expert_domains:
            training_job(config, name)
    require_parents(config, run, model_names(config))
    require_checkpoints(config, run)
    return config


def as_recorded(config: RunConfig, run: RunDir) -> RunConfig:
    """Return the config of a rank that another program starts, with the earlier budgets that a prepared run records.

    Raises as `continued` does, and ConfigError if the run has not recorded this budget: groups that start later would
    not know from which step the models of this one trained with it.
    """
    fitting = continued(config, run)
    ours, recorded = fitting.budget, current_config(fitting, run).budget
    if any(getattr(ours, name) != getattr(recorded, name) for name in ("tokens", *RECORDED)):
        raise ConfigError(
            f"The run in {run.root} has not recorded this budget. Ranks that other programs start need it in run.yaml: "
            f"run btm-scale prepare CONFIG --out {run.root} first."
        )
    return fitting


def require_continuable(config: RunConfig, run: RunDir) -> list[Difference]:
    """Return the settings that differ from the run's. Raises ConfigError, which lists these too, if one may not."""
    _, changes = compared(config, run)
    allowed = [one for one in changes if one.is_allowed]
    _refuse(run, [one for one in changes if not one.is_allowed], allowed)
    return allowed


def _refuse(run: RunDir, refused: Sequence[Difference], allowed: Sequence[Difference] = ()) -> None:
    """Raise ConfigError if a difference is refused; the message lists the allowed ones too."""
    if refused:
        lines = [f"{run.root} holds a run with a different config. The differences are:", *_indented(refused)]
        lines += ["These may change:", *_indented(allowed)] if allowed else []
        raise ConfigError("\n".join([*lines, "Use a different --out, or delete that folder."]))


def _indented(changes: Iterable[Difference]) -> list[str]:
    return [f"  {change}" + (f": {change.effect}" if change.effect else "") for change in changes]


def compared(config: RunConfig, run: RunDir) -> tuple[RunConfig, list[Difference]]:
    """Return the config as it continues the run, and the settings that differ from the run's.

    Each `auto` is replaced by the precision recorded in the run's folder; a config without a `name` takes the run's; a
    raised budget gets those that models were trained with before. Settings that affect how a model is trained, scored
    or started, but not the resulting model, may differ: their fields are marked with `Changes`. Everything may differ
    until the folder holds a result that depends on the config, so that a first attempt that failed can be corrected.

    Raises ConfigError for names that `check_names` rejects.
    """
    existing = RunConfig.load(run.config) if run.config.is_file() else None
    check_names(config, known=existing.all_domains if existing is not None else ())
    if existing is not None:
        config = config.with_precisions_of(existing)
    if existing is None or not has_results(run):
        return config, []
    if not config.is_named:
        config = config.model_copy(update={"name": existing.name})
    config = with_recorded_budgets(config, existing)
    changes = _differences(existing.with_precisions_of(config), config)
    return with_earlier_budgets(config, existing, run), changes


def has_results(run: RunDir) -> bool:
    """Return whether anything in a run's folder depends on its config, or a process or a SLURM job may write some."""
    return (
        run.tokenizer.exists()
        or any(not path.parent.name.startswith(".") for path in run.data.glob("*/fingerprint.json"))
        or any(_is_of_training(path) for path in run.train("").rglob("*"))
        or any(run.root.glob("*/expert.json"))
        or any(run.root.glob("*/*/expert.json"))
        or is_held(run.prepare_lock)
        or _may_be_queued(run)
    )


def _is_of_training(path: Path) -> bool:
    return path.name in ("branch.json", "metrics.jsonl") or path.name.startswith("step-")


def _may_be_queued(run: RunDir) -> bool:
    """Return whether a SLURM job of the run is pending or running, or may be."""
    submissions = slurm_queue.Submissions(run.root / "slurm")
    submitted = submissions.read()
    if not submitted:
        return False
    try:
        return not all(one.id for one in submitted) or bool(submissions.live(slurm_commands.queue()))
    except LaunchError:  # SLURM does not answer
        return True


def on_this_device(config: RunConfig, run: RunDir, *, logs: bool = True) -> RunConfig:
    """Return the config with each `auto` replaced by this machine's fast precision; `logs` the device.

    Raises LaunchError if this device cannot train in the precision of a model that is not done, if such a model has
    more ranks than the machine has GPUs, and as `usable_gpus` does.
    """
    todo = [model for model in model_names(config) if not is_done(config, run, model)]
    if todo:
        require_monitors(config)
    gpus = usable_gpus(config.launch.device) if todo else Gpus()
    for model in todo:
        require_gpus(gpus, model, training_job(config, model).layout.ranks)
    if todo and logs:
        devices = f"GPUs: {len(gpus.names)} x {gpus.kinds[0]}" if gpus.names else f"the CPU: {gpus.reason}"
        logger.info("groups run on %s", devices)
        if not gpus.names and any(training_job(config, model).layout.float8 for model in todo):
            logger.warning("layout.float8 is emulated on a CPU, which takes many times as long as bf16")
    if "auto" in config.precisions:
        config = config.with_precision(ask_device(config.launch.device).fast)
    needed = {training_job(config, model).layout.precision for model in todo}
    if needed:
        needed.add(config.layout.precision)  # averages are scored in it
    # Every device supports fp32, and every CPU bf16, at least by emulation.
    if needed - ({"fp32"} if gpus.names else {"fp32", "bf16"}):
        ask_device(config.launch.device).require(needed)
    return config


def require_prepared(config: RunConfig, run: RunDir) -> None:
    """Raise DataError unless the run has a tokenizer and the token files of every domain."""
    missing = [] if run.tokenizer.is_dir() else ["a tokenizer"]
    missing += [f"token files of '{name}'" for name in config.all_domains if not run.fingerprint(name).is_file()]
    if missing:
        raise DataError(
            f"The run in {run.root} is not prepared: it lacks {first_few(missing, 'domains')}. Prepare it first: "
            f"btm-scale prepare CONFIG --out {run.root}. btm-scale run prepares and trains in one command."
        )


def is_prepared(config: RunConfig, run: RunDir, domains: Sequence[str] = ()) -> bool:
    """Return whether the run has a tokenizer and the token files of these domains, or of every domain."""
    return run.tokenizer.is_dir() and all(run.fingerprint(name).is_file() for name in domains or config.all_domains)


def is_newest(config: RunConfig, run: RunDir, path: Path) -> bool:
    """Return whether every model is finished, and a file of the evaluation is newer."""
    if not path.is_file():
        return False
    if not all(is_trained(config, run, model) for model in model_names(config)):
        return False
    cards = [run.model(model) / "expert.json" for model in model_names(config)]
    return all(card.stat().st_mtime <= path.stat().st_mtime for card in cards)


def is_done(config: RunConfig, run: RunDir, model: str) -> bool:
    """Return whether a model is trained, exported and scored."""
    return is_trained(config, run, model) and not missing_scores(config, run, model, all_texts(config))


def state_at_rest(config: RunConfig, run: RunDir, model: str) -> State:
    """Return done, failed, stopped (it resumes) or waiting, for a model that no process trains."""
    if is_done(config, run, model):
        return "done"
    if (run.train(model) / STOPPED).is_file():  # what its ranks reported while they were ended is not a failure
        return "stopped"
    if read_failure(run.log(model)) is not None:
        return "failed"
    return "stopped" if run.metrics(model).is_file() else "waiting"


def next_models(config: RunConfig, run: RunDir) -> list[str]:
    """Return the models that can be trained now: those of the first incomplete stage that are not done."""
    for stage in training_stages(config):
        todo = [model for model in stage if not is_done(config, run, model)]
        if todo:
            return todo
    return []


def training_commands(config: RunConfig, run: RunDir, models: Sequence[str]) -> list[GroupCommand]:
    """Return the command of a group for each model that is not trained, exported and scored yet, in the given order."""
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
    """Return the training progress of each model in `states`, in the run's order."""
    return [
        read_progress(
            run,
            model,
            training_job(config, model).steps,
            state=states[model],  # type: ignore[arg-type]
            is_exported=is_trained(config, run, model),
            measured=config.dev_loss.every > 0,
        )
        for model in model_names(config)
        if model in states
    ]


def _differences(existing: RunConfig, config: RunConfig) -> list[Difference]:
    """Return the settings that differ, and whether they may. Layouts are compared as resolved for each model."""
    names = [*existing.experts, *config.experts]
    free = _additions(existing, config)
    changes = [
        replace(difference, effect=_ADDED) if difference.path[:2] in free else difference
        for difference in differences(_with_layouts(existing, names), _with_layouts(config, names))
    ]
    # A change of `layout` also changes every layout that inherits the value; it is reported once.
    of_all = [replace(one, path=one.path[1:]) for one in changes if one.path[0] == "layout"]
    overrides = ("seed_layout", "experts")
    return [one for one in changes if one.path[0] not in overrides or replace(one, path=one.path[-1:]) not in of_all]


def _with_layouts(config: RunConfig, experts: Iterable[str]) -> RunConfig:
    """Return the config with every layout override replaced by the resulting layout."""
    own = {name: config.experts.get(name, ExpertConfig()) for name in experts}
    resolved = {name: one.model_copy(update={"layout": config.expert_layout(name)}) for name, one in own.items()}
    return config.model_copy(update={"seed_layout": config.shared_layout, "experts": resolved})


def _additions(existing: RunConfig, config: RunConfig) -> set[tuple[str, ...]]:
    """Return the YAML paths of domains that only one config has and on which no earlier training depends."""
    added = existing.added_domains.keys() ^ config.added_domains.keys()
    novel = existing.novel_domains.keys() ^ config.novel_domains.keys()
    return {(section, name) for name in added for section in ("added_domains", "experts")} | {
        ("novel_domains", name) for name in novel
    }
