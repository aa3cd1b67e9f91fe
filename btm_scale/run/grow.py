"""A run that grows: a domain and its expert are added to a forest that stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from btm_scale.checkpoint.merge.merge import merge
from btm_scale.config.run import RunConfig
from btm_scale.config.section import explain
from btm_scale.data.prepare import prepare
from btm_scale.errors import ConfigError, ForestError
from btm_scale.forest.branch import parents_of
from btm_scale.forest.expert import CARD, Expert, is_finished, read_expert
from btm_scale.forest.forest import experts, remove_expert
from btm_scale.run.pipeline import score_models
from btm_scale.run.state import open_run
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import training_job
from btm_scale.train.start import Beginning, settle


def branch_expert(
    config: RunConfig,
    run: RunDir,
    name: str,
    parents: str | dict[str, float],
    *,
    text: Sequence[Path] = (),
    settings: dict[str, object] | None = None,
) -> Beginning:
    """Make a new expert's first weights, and put it into the run's config, so that the next `run` trains it.

    `text`: of a domain that the run doesn't know yet; `settings` of the branch, as in the YAML. Nothing that stands
    is changed. Raises ConfigError or ForestError.
    """
    if is_finished(run.model(name)):
        raise ForestError(f"'{name}' is an expert of {run.root} already; choose another --name")
    grown = _with_branch(config, name, parents, text, settings or {})
    job = training_job(grown, name)
    if job.branch is None:
        raise ConfigError(f"'{name}' has a model of its own size, which nothing can be branched into")
    if parents not in ("nearest", "posterior"):
        # What can be wrong with named parents is told before any text is read.
        parents_of(run, name, job.branch)
    open_run(grown, run)
    try:
        prepare(grown, run)
        forest = list(experts(run))
        if parents in ("nearest", "posterior") and forest:
            score_models(grown, run, forest)
        begun = settle(grown, run, job)
        _write_first_weights(run, name, begun)
    except BaseException:
        config.save(run.config)
        raise
    return begun


def remove_from_forest(config: RunConfig, run: RunDir, name: str) -> None:
    """Take an expert out of the forest; a domain that was added for it goes from the run's config too."""
    remove_expert(run, name)
    if name in config.added_domains:
        others = {other: domain for other, domain in config.added_domains.items() if other != name}
        own = {other: expert for other, expert in config.experts.items() if other != name}
        config.model_copy(update={"added_domains": others, "experts": own}).save(run.config)


def _with_branch(
    config: RunConfig,
    name: str,
    parents: str | dict[str, float],
    text: Sequence[Path],
    settings: dict[str, object],
) -> RunConfig:
    known = name in config.expert_domains
    if known and text:
        raise ConfigError(f"domain '{name}' has its text already; leave --text out, or choose another --name")
    if not known and not text:
        raise ConfigError(
            f"the run has no domain '{name}': give its text with --text, or one of {', '.join(config.expert_domains)}"
        )
    values = config.model_dump(mode="json")
    if not known:
        values["added_domains"][name] = {"text": [str(path.absolute()) for path in text]}
    own = values["experts"].setdefault(name, {})
    own["branch"] = {"parents": parents, **settings}
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from None


def _write_first_weights(run: RunDir, name: str, begun: Beginning) -> None:
    directory = run.first_weights(name)
    if is_finished(directory):
        return
    report = merge(directory, [(run.model(parent.name), parent.weight) for parent in begun.parents])
    hashes = {parent.name: read_expert(run.model(parent.name)).content_hash for parent in begun.parents}
    card = Expert(
        name=name,
        domains={},
        parents=begun.parents,
        tokens=0,
        steps=0,
        layout={},
        data_fingerprint=hashes,
        content_hash=report.content_hash,
    )
    card.save(directory / CARD)
