"""Greedy soups: the experts whose uniform average predicts a domain's dev text best (arXiv 2203.05482, recipe 1)."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import torch.distributed as dist

from btm_scale.checkpoint.merge.compatibility import promoted_dtype
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.distributed.group import ExpertGroup
from btm_scale.errors import ForestError
from btm_scale.evaluate.score import load_model, text_log_probs
from btm_scale.forest.forest import experts
from btm_scale.forest.scores import Scores, evaluation_text
from btm_scale.run_dir import AVERAGE, RunDir
from btm_scale.util.files import make_directory
from btm_scale.util.records import Record


class Soups(Record):
    """soups.json: the members of every domain's soup, and the forest that they were chosen from."""

    ERROR = ForestError
    REMEDY = "Delete it, and run btm-scale evaluate again."

    forest: dict[str, str]  # content hash of each expert
    members: dict[str, tuple[str, ...]]  # by domain


def greedy_members(candidates: Sequence[str], loss: Callable[[tuple[str, ...]], float]) -> tuple[str, ...]:
    """The members of a soup: from the best candidate on, each stays whose joining doesn't raise the loss.

    `candidates` best first; `loss` of the uniform average of some of them.
    """
    members: tuple[str, ...] = (candidates[0],)
    lowest = loss(members)
    for candidate in candidates[1:]:
        found = loss((*members, candidate))
        if found <= lowest:
            members, lowest = (*members, candidate), found
    return members


def soups(config: RunConfig, run: RunDir) -> dict[str, tuple[str, ...]] | None:
    """The members of every domain's soup, or None if they were chosen from another forest or not at all."""
    found = Soups.find(run.soups)
    if found is None or found.forest != _hashes(run) or not set(config.all_domains) <= set(found.members):
        return None
    return found.members


def save_soups(run: RunDir, members: dict[str, tuple[str, ...]]) -> None:
    """Keep the members of every domain's soup, chosen from the forest as it stands."""
    make_directory(run.soups.parent)
    Soups(forest=_hashes(run), members=members).save(run.soups)


def _hashes(run: RunDir) -> dict[str, str]:
    return {name: expert.content_hash for name, expert in experts(run).items()}


def choose_soups(group: ExpertGroup, config: RunConfig, run: RunDir) -> None:
    """Choose every domain's soup by averaging and scoring; all ranks of the group take part."""
    known: dict[tuple[str, tuple[str, ...]], float] = {}
    members = {}
    for domain in config.all_domains:
        text = evaluation_text(config, run, domain, "dev")
        alone = {name: -float(Scores.load(run.scores(name, domain, "dev")).log_probs.mean()) for name in experts(run)}

        def loss(names: tuple[str, ...], text: EvaluationText = text, alone: dict[str, float] = alone) -> float:
            key = text.domain, tuple(sorted(names))
            if key not in known:
                known[key] = alone[names[0]] if len(names) == 1 else _loss(group, run, key[1], text)
            return known[key]

        members[domain] = greedy_members(sorted(alone, key=lambda name: (alone[name], name)), loss)
    if group.is_first:
        save_soups(run, members)
    dist.barrier()


def _loss(group: ExpertGroup, run: RunDir, names: tuple[str, ...], text: EvaluationText) -> float:
    """Nats per token of the average on `text`, the same on every rank."""
    directory = run.model(f"{AVERAGE}.soup")
    if group.is_first:
        shutil.rmtree(directory, ignore_errors=True)
        models = [run.model(name) for name in names]
        merge(directory, [(model, 1.0) for model in models], dtype=promoted_dtype(models))
    dist.barrier()
    network = load_model(group, directory)
    log_probs = text_log_probs(group, network, text)
    found = [-float(log_probs.mean())]
    dist.broadcast_object_list(found, src=0)
    dist.barrier()
    if group.is_first:
        shutil.rmtree(directory)
    return found[0]
