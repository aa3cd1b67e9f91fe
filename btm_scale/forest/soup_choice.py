"""Who is in a greedy soup, found by averaging and scoring on a group of ranks."""

from __future__ import annotations

import shutil

import torch.distributed as dist

from btm_scale.checkpoint.merge import merge
from btm_scale.config.run import RunConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.forest.forest import experts
from btm_scale.forest.scores import Scores, evaluation_text
from btm_scale.forest.scoring import load_model, text_log_probs
from btm_scale.forest.soup import greedy_members, save_soups
from btm_scale.run_dir import AVERAGE, RunDir


def choose_soups(group: ExpertGroup, config: RunConfig, run: RunDir) -> None:
    """Choose every domain's soup by averaging and scoring; all ranks of the group take part."""
    known: dict[tuple[str, tuple[str, ...]], float] = {}
    members = {}
    for domain in config.all_domains:
        alone = {name: -float(Scores.load(run.scores(name, domain, "dev")).log_probs.mean()) for name in experts(run)}

        def loss(names: tuple[str, ...], domain: str = domain, alone: dict[str, float] = alone) -> float:
            key = domain, tuple(sorted(names))
            if key not in known:
                known[key] = alone[names[0]] if len(names) == 1 else _loss(group, config, run, key[1], domain)
            return known[key]

        members[domain] = greedy_members(sorted(alone, key=lambda name: (alone[name], name)), loss)
    if group.is_first:
        save_soups(run, members)
    dist.barrier()


def _loss(group: ExpertGroup, config: RunConfig, run: RunDir, names: tuple[str, ...], domain: str) -> float:
    """Nats a token of the average on the domain's dev text, the same on every rank."""
    directory = run.model(f"{AVERAGE}.soup")
    if group.is_first:
        shutil.rmtree(directory, ignore_errors=True)
        merge(directory, [(run.model(name), 1.0) for name in names])
    dist.barrier()
    network = load_model(group, directory)
    log_probs = text_log_probs(group, network, evaluation_text(config, run, domain, "dev"))
    found = [-float(log_probs.mean())]
    dist.broadcast_object_list(found, src=0)
    dist.barrier()
    if group.is_first:
        shutil.rmtree(directory)
    return found[0]
