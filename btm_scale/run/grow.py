"""Add experts to a run or remove them, by editing its run.yaml."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from btm_scale.config.run import RunConfig
from btm_scale.config.section import explain
from btm_scale.data.prepare import prepare
from btm_scale.errors import ConfigError, ForestError, unknown_name
from btm_scale.forest.abandoned import remove_abandoned
from btm_scale.forest.branch import Branch, decide, has_begun, parents_of, require_one_shape
from btm_scale.forest.expert import is_finished
from btm_scale.forest.forest import experts
from btm_scale.forest.membership import remove_expert, remove_folders
from btm_scale.forest.methods import check_names
from btm_scale.forest.removed import note_removal, was_removed
from btm_scale.forest.turns import changing_config, current_config, removing, scoring
from btm_scale.run.pipeline import score_models
from btm_scale.run.raised import with_first_budgets
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import training_job
from btm_scale.util.files import make_directory
from btm_scale.util.locks import ModelLock


def branch_expert(
    config: RunConfig,
    run: RunDir,
    name: str,
    parents: str | dict[str, float],
    *,
    text: Sequence[Path] = (),
    settings: dict[str, object] | None = None,
) -> tuple[Branch, Branch | None]:
    """Settle a new expert's parents, and add the expert to the run's config, so that the next `run` trains it.

    Args: `text` of a domain that is new to the run; `settings` of the branch, as in the YAML, and `train`. Returns the
    branch and the one that it replaces: until training begins, a call with other arguments settles the parents again,
    and a call with the same arguments changes nothing, even after training. Raises ConfigError or ForestError, and then
    leaves the run's config and records as they were.
    """
    with changing_config(run):
        config = current_config(config, run)
        settled = _settled_before(config, run, name, parents, text, settings or {})
        return (settled, None) if settled else _branch(config, run, name, parents, text, settings or {})


def _settled_before(
    config: RunConfig,
    run: RunDir,
    name: str,
    parents: str | dict[str, float],
    text: Sequence[Path],
    settings: dict[str, object],
) -> Branch | None:
    """Return the branch of an expert that has begun to train, if it was settled by these arguments."""
    if not (is_finished(run.model(name)) or has_begun(run, name)) or name not in config.experts:
        return None
    try:
        same = _with_branch(config, name, parents, text, settings) == config
    except ConfigError:
        return None
    return Branch.find(run.branch(name)) if same else None


def _branch(
    config: RunConfig,
    run: RunDir,
    name: str,
    parents: str | dict[str, float],
    text: Sequence[Path],
    settings: dict[str, object],
) -> tuple[Branch, Branch | None]:
    """Settle the parents and rewrite the config, as `branch_expert` does, which holds the config's lock."""
    _require_untrained(run, name)
    grown = with_first_budgets(_with_branch(config, name, parents, text, settings), run)
    job = training_job(grown, name)
    if job.branch is None:
        raise ConfigError(
            f"'{name}' cannot branch, because its model has its own sizes. Only experts with the run's sizes branch. "
            "Choose another --name."
        )
    former = Branch.find(run.branch(name))
    if former is not None and grown == config and all(is_finished(run.model(one.name)) for one in former.parents):
        return former, None
    chosen_by_score = isinstance(parents, str) and parents != "seed"
    if chosen_by_score and not experts(run):
        parents_of(run, name, job.branch)  # raises before any text is read
    if isinstance(parents, dict):
        # Problems with named parents are reported before any text is read.
        require_one_shape(grown, run, name, parents_of(run, name, job.branch))
    try:
        prepare(grown, run)
        forest = list(experts(run))
        if chosen_by_score and forest:
            with scoring(run):
                score_models(grown, run, forest)
        settled = decide(grown, run, name, job.branch, job.weights)
        _require_untrained(run, name)
        # Deleted before the config changes, so that the former parents are never used with the new config.
        run.branch(name).unlink(missing_ok=True)
        # Not before its text is prepared: a group that starts meanwhile would score the new domain too.
        grown.save(run.config)
    except BaseException:
        config.save(run.config)
        if former is not None and not run.branch(name).exists():
            former.save(run.branch(name))
        raise
    make_directory(run.train(name))
    settled.save(run.branch(name))
    return settled, former


def remove_from_forest(config: RunConfig, run: RunDir, name: str) -> bool:
    """Remove an expert from the forest, or undo the branch of an untrained one; nothing else changes.

    A domain that was added for it is removed from the run's config too. Waits for commands that score or evaluate.
    Returns False if it was removed before, and then completes what an interrupted removal left. Raises ForestError if
    the run never had the expert, if it cannot be removed, or while the run is being trained.
    """
    remove_abandoned(current_config(config, run), run)
    # Answered before the locks: another command may hold them for long, and a refusal leaves none behind.
    if not _is_removable(current_config(config, run), run, name):
        _require_removed(run, name)
        if not _leftovers(current_config(config, run), run, name):
            return False
    with removing(run, name):
        config = current_config(config, run)
        if not _is_removable(config, run, name):
            _require_removed(run, name)
            remove_folders(_leftovers(config, run, name))
            return False
        note_removal(run, name)
        if name in config.added_domains and not is_finished(run.model(name)):
            remove_folders([run.train(name)])
        else:
            remove_expert(run, name)
        if name in config.added_domains:
            others = {other: domain for other, domain in config.added_domains.items() if other != name}
            own = {other: expert for other, expert in config.experts.items() if other != name}
            config.model_copy(update={"added_domains": others, "experts": own}).save(run.config)
    return True


def _is_removable(config: RunConfig, run: RunDir, name: str) -> bool:
    return name in config.added_domains or name in experts(run)


def _require_removed(run: RunDir, name: str) -> None:
    if not was_removed(run, name):
        raise ForestError(unknown_name("expert", name, experts(run)))


def _leftovers(config: RunConfig, run: RunDir, name: str) -> list[Path]:
    """Return the folders of an expert whose removal was interrupted; a domain's expert may be in training again."""
    folders = [run.model_scores(name), *([] if name in config.expert_domains else [run.train(name)])]
    return [folder for folder in folders if folder.is_symlink() or folder.exists()]


def _require_untrained(run: RunDir, name: str) -> None:
    if is_finished(run.model(name)):
        raise ForestError(
            f"'{name}' is already an expert of {run.root}. A trained expert keeps its parents. Choose another --name, "
            f"or remove it first: btm-scale forest remove {run.root} {name}"
        )
    if ModelLock.is_held(run.train(name)) or has_begun(run, name):
        raise ForestError(
            f"'{name}' has begun to train in {run.root}. Its parents can no longer change. Choose another --name, or "
            f"finish its training: btm-scale run {run.config} --out {run.root}"
        )


def _with_branch(
    config: RunConfig,
    name: str,
    parents: str | dict[str, float],
    text: Sequence[Path],
    settings: dict[str, object],
) -> RunConfig:
    """Return the config with the expert's branch added, and its domain if that is new."""
    paths = tuple(str(path.absolute()) for path in text)
    domain = config.expert_domains.get(name)
    if domain is None and not paths:
        raise ConfigError(
            f"The run has no domain '{name}'. Give its text with --text, or choose one of "
            f"{', '.join(config.expert_domains)}."
        )
    if domain is not None and paths and paths != domain.text:
        raise ConfigError(
            f"Domain '{name}' already has text: {', '.join(domain.text)}. A domain keeps its text. Remove --text, or "
            "choose another --name."
        )
    values = config.model_dump(mode="json")
    if domain is None:
        values["added_domains"][name] = {"text": list(paths)}
    own = values["experts"].setdefault(name, {})
    own |= {key: value for key, value in settings.items() if key == "train"}
    own["branch"] = {"parents": parents, **{key: value for key, value in settings.items() if key != "train"}}
    try:
        grown = RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from None
    check_names(grown, known=config.all_domains)
    return grown
