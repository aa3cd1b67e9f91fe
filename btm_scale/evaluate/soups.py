"""Greedy soups: experts whose uniform average has a low loss on a domain's dev text (arXiv 2203.05482, recipe 1)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence

import torch.distributed as dist
from pydantic import Field

from btm_scale.checkpoint.merge.compatibility import promoted_dtype
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.distributed.group import ExpertGroup
from btm_scale.errors import ForestError
from btm_scale.evaluate.score import load_model, text_log_probs
from btm_scale.forest.forest import experts
from btm_scale.forest.scores import Scores, evaluation_text, scored_tokens
from btm_scale.run_dir import AVERAGE, RunDir
from btm_scale.util.files import make_directory
from btm_scale.util.records import InsideName, Record, is_empty


class Soups(Record):
    """soups.json: the members of every domain's soup, and the forest from which they were chosen."""

    ERROR = ForestError
    REMEDY = "Delete it, and run btm-scale evaluate again."

    forest: dict[str, str]  # content hash of each expert
    members: dict[str, tuple[InsideName, ...]]  # by domain
    # Tokens of each domain's dev text; empty in files of earlier versions, whose text could not change.
    tokens: dict[str, int] = Field(default={}, exclude_if=is_empty)


def greedy_members(candidates: Sequence[str], loss: Callable[[tuple[str, ...]], float]) -> tuple[str, ...]:
    """Return the members of a soup: starting with the best candidate, each that does not raise the loss is added.

    Args: `candidates`, best first; `loss`, of the uniform average of a subset.
    """
    members: tuple[str, ...] = (candidates[0],)
    lowest = loss(members)
    for candidate in candidates[1:]:
        candidate_loss = loss((*members, candidate))
        if candidate_loss <= lowest:
            members, lowest = (*members, candidate), candidate_loss
    return members


def soups(config: RunConfig, run: RunDir) -> dict[str, tuple[str, ...]] | None:
    """Return the members of every domain's soup, or None if they are not chosen yet or from another forest."""
    recorded = Soups.find(run.soups)
    if recorded is None or recorded.forest != _hashes(run) or not set(config.all_domains) <= set(recorded.members):
        return None
    tokens = _dev_tokens(config, run)
    if any(recorded.tokens.get(domain, count) != count for domain, count in tokens.items()):
        return None
    return recorded.members


def save_soups(run: RunDir, members: dict[str, tuple[str, ...]], tokens: Mapping[str, int] | None = None) -> None:
    """Record the members of every domain's soup, chosen from the current forest by this many tokens of dev text."""
    make_directory(run.soups.parent)
    Soups(forest=_hashes(run), members=members, tokens=dict(tokens or {})).save(run.soups)


def _dev_tokens(config: RunConfig, run: RunDir) -> dict[str, int]:
    counts = {domain: scored_tokens(config, run, domain, "dev") for domain in config.all_domains}
    return {domain: count for domain, count in counts.items() if count is not None}


def _hashes(run: RunDir) -> dict[str, str]:
    return {name: expert.content_hash for name, expert in experts(run).items()}


def choose_soups(group: ExpertGroup, config: RunConfig, run: RunDir) -> None:
    """Choose every domain's soup by averaging and scoring. All ranks call this together."""
    losses: dict[tuple[str, tuple[str, ...]], float] = {}
    members = {}
    for domain in config.all_domains:
        text = evaluation_text(config, run, domain, "dev")
        alone = {
            name: -float(text.of_targets(Scores.load(run.scores(name, domain, "dev")).log_probs).mean())
            for name in experts(run)
        }

        def loss(names: tuple[str, ...], text: EvaluationText = text, alone: dict[str, float] = alone) -> float:
            key = text.domain, tuple(sorted(names))
            if key not in losses:
                losses[key] = alone[names[0]] if len(names) == 1 else _loss(group, run, key[1], text)
            return losses[key]

        members[domain] = greedy_members(sorted(alone, key=lambda name: (alone[name], name)), loss)
    if group.is_first:
        save_soups(run, members, _dev_tokens(config, run))
    dist.barrier()


def _loss(group: ExpertGroup, run: RunDir, names: tuple[str, ...], text: EvaluationText) -> float:
    """Return the loss of the average on `text` in nats per token, the same on every rank."""
    directory = run.model(f"{AVERAGE}.soup")
    try:
        if group.is_first:
            shutil.rmtree(directory, ignore_errors=True)
            models = [run.model(name) for name in names]
            merge(directory, [(model, 1.0) for model in models], dtype=promoted_dtype(models), with_recipe=False)
        dist.barrier()
        network = load_model(group, directory)
        log_probs = text_log_probs(group, network, text)
        losses = [-float(text.of_targets(log_probs).mean())]
        dist.broadcast_object_list(losses, src=0)
        dist.barrier()
    finally:
        if group.is_first:
            shutil.rmtree(directory, ignore_errors=True)
    return losses[0]
