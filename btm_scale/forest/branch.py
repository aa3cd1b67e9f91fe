"""Branching: an expert's parents and training text, decided once and recorded (arXiv 2208.03306, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
from pydantic import Field

from btm_scale.config.run import RunConfig
from btm_scale.config.training import BranchConfig
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.errors import ForestError, unknown_name
from btm_scale.forest.expert import Parent, find_expert, is_finished, read_expert
from btm_scale.forest.forest import experts
from btm_scale.forest.scores import dev_prior
from btm_scale.model.hf_config import read_shape
from btm_scale.model.shape import ModelShape
from btm_scale.run_dir import SEED, RunDir
from btm_scale.util.files import make_directory
from btm_scale.util.records import InsideName, Record, is_empty

# Parents with less weight are dropped: reading them would cost time and change almost nothing.
_LEAST_WEIGHT = 1e-3


class Branch(Record):
    """branch.json: a model's parents and training text, which later changes of the forest do not affect."""

    ERROR: ClassVar = ForestError
    REMEDY: ClassVar = "Delete {path}, and the parents are decided again."

    parents: tuple[Parent, ...]  # their weights sum to 1; none for the seed LM
    domains: dict[InsideName, float]  # fractions of the training text, replayed text included
    # The parents' content hashes when training began; absent for unfinished parents, and in earlier versions' files.
    parent_hashes: dict[InsideName, str] = Field(default_factory=dict, exclude_if=is_empty)


def settle(
    config: RunConfig, run: RunDir, model: str, branch: BranchConfig | None, weights: Mapping[str, float]
) -> Branch:
    """Return the branch of a model whose training begins: the recorded one, or else one that is decided and recorded.

    Until there is a checkpoint, each call records the parents' content hashes.

    Args: `branch`, None for a model without parents; `weights`, its relative amounts of training text by domain.
    Raises ForestError as `decide` does.
    """
    path = run.branch(model)
    recorded = Branch.find(path)
    if recorded is not None and has_begun(run, model):
        return recorded
    settled = recorded or decide(config, run, model, branch, weights)
    cards = {parent.name: find_expert(run.model(parent.name)) for parent in settled.parents}
    hashes = {name: card.content_hash for name, card in cards.items() if card is not None}
    settled = settled.model_copy(update={"parent_hashes": hashes})
    if settled != recorded:
        make_directory(path.parent)
        settled.save(path)
    return settled


def decide(
    config: RunConfig, run: RunDir, model: str, branch: BranchConfig | None, weights: Mapping[str, float]
) -> Branch:
    """Return a model's parents and training text, from the forest as it is now.

    Raises ForestError if a parent is missing or of another shape, or if its text cannot be replayed.
    """
    total = sum(weights.values())
    domains = {domain: weight / total for domain, weight in weights.items()}
    if branch is None:
        return Branch(parents=(), domains=domains)
    parents = parents_of(run, model, branch)
    if branch.parents != "seed":
        require_one_shape(config, run, model, parents)
    if branch.replay > 0:
        domains = {domain: share * (1.0 - branch.replay) for domain, share in domains.items()}
        for parent in parents:
            for domain, share in _text_of(config, run, parent.name).items():
                domains[domain] = domains.get(domain, 0.0) + branch.replay * parent.weight * share
    return Branch(parents=parents, domains=domains)


def replayed_fraction(config: RunConfig, run: RunDir, parents: Sequence[Parent], domain: str) -> float:
    """Return the fraction of the text that `branch.replay` adds that is of this domain.

    Raises ForestError if a parent is missing or its text cannot be replayed.
    """
    return sum(parent.weight * _text_of(config, run, parent.name).get(domain, 0.0) for parent in parents)


def parents_of(run: RunDir, name: str, branch: BranchConfig) -> tuple[Parent, ...]:
    """Return the parents of an expert for domain `name`; their weights sum to 1.

    `nearest` and `posterior` depend on the scores of the forest's experts on the domain's dev text. Raises ForestError
    if a named parent is not a finished model of this run, or those scores are missing.
    """
    if branch.parents == "seed":
        return (Parent(SEED, 1.0),)
    if isinstance(branch.parents, dict):
        return _named(run, name, branch.parents)
    candidates = [expert for expert in experts(run) if expert != name]
    if not candidates:
        raise ForestError(
            f"{name} cannot branch by {branch.parents}: there is no expert in {run.experts}. Train one first, or "
            "branch from the seed LM."
        )
    weights = np.exp(dev_prior(run, candidates, name))
    if branch.parents == "nearest":
        return (Parent(candidates[int(np.argmax(weights))], 1.0),)
    kept = {
        expert: float(weight) for expert, weight in zip(candidates, weights, strict=True) if weight >= _LEAST_WEIGHT
    }
    return _normalised(kept)


def require_one_shape(config: RunConfig, run: RunDir, name: str, parents: Sequence[Parent]) -> None:
    """Raise ForestError unless every parent computes the same function of its weights as the new expert will."""
    rows = Tokenizer.load(run.tokenizer).vocab_size
    ours = _comparable(config.expert_model(name).shape(rows, config.budget.sequence_length))
    for parent in parents:
        theirs = _comparable(read_shape(run.model(parent.name)))
        differences = [f"{key} is {theirs[key]} there and {ours[key]} here" for key in ours if theirs[key] != ours[key]]
        if differences:
            raise ForestError(
                f"{name} cannot branch from '{parent.name}': {', '.join(differences)}. Parents must have the shape of "
                f"the run's own models. Name others: --from A=0.3,B=0.7, or experts.{name}.branch.parents in the YAML."
            )


def require_parents(config: RunConfig, run: RunDir, models: Sequence[str]) -> None:
    """Raise ForestError unless every named parent of an expert that has yet to train exists or is trained before it.

    Args: `models`, all that the run trains, parents before children.
    """
    problems = []
    for name, expert in config.experts.items():
        parents = expert.branch.parents
        if not isinstance(parents, dict) or has_begun(run, name) or is_finished(run.model(name)):
            continue
        earlier = models[: models.index(name)]
        problems += [
            f"experts.{name}.branch.parents: {unknown_name('model', parent, _choices(run, earlier))}"
            for parent in parents
            if parent not in earlier and not is_finished(run.model(parent))
        ]
    if problems:
        raise ForestError("\n".join(problems))


def has_begun(run: RunDir, model: str) -> bool:
    """Return whether a model has a training checkpoint, so that its parents are no longer read."""
    return any(run.checkpoints(model).glob("step-*"))


def _comparable(shape: ModelShape) -> dict[str, object]:
    sizes = shape.model_dump()
    if shape.rotary:
        del sizes["positions"]  # a limit on the input; no weight depends on it
    return sizes


def _named(run: RunDir, name: str, parents: Mapping[str, float]) -> tuple[Parent, ...]:
    for parent in parents:
        if not is_finished(run.model(parent)):
            raise ForestError(
                f"{name} cannot branch from '{parent}', which is not a finished model of {run.root}. Use one of "
                f"{', '.join(_choices(run))}."
            )
    return _normalised(parents)


def _choices(run: RunDir, others: Sequence[str] = ()) -> list[str]:
    """Return the models that a parent may be: the seed LM, `others` and the forest."""
    return list(dict.fromkeys([SEED, *others, *experts(run)]))


def _normalised(weights: Mapping[str, float]) -> tuple[Parent, ...]:
    total = sum(weights.values())
    return tuple(Parent(parent, weight / total) for parent, weight in weights.items() if weight > 0)


def _text_of(config: RunConfig, run: RunDir, parent: str) -> dict[str, float]:
    """Return the domains that a parent was trained on and this run has text of, with fractions that sum to 1."""
    shares = read_expert(run.model(parent)).domains
    available = {domain: share for domain, share in shares.items() if domain in config.expert_domains}
    if not available:
        raise ForestError(
            f"The text of '{parent}' cannot be replayed: it was trained on {', '.join(shares) or 'unknown text'}. Only "
            "text of this run's domains can be replayed. Set branch.replay to 0, or choose another parent."
        )
    total = sum(available.values())
    return {domain: share / total for domain, share in available.items()}
