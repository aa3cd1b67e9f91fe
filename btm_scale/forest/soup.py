"""Greedy soups: the experts whose uniform average predicts a domain's dev text best (arXiv 2203.05482, recipe 1)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from btm_scale.config.run import RunConfig
from btm_scale.forest.forest import experts
from btm_scale.run_dir import RunDir
from btm_scale.util.files import write_file


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
    try:
        found = json.loads(run.soups.read_text())
    except FileNotFoundError:
        return None
    members = {domain: tuple(names) for domain, names in found["members"].items()}
    return members if found["forest"] == _hashes(run) and set(config.all_domains) <= set(members) else None


def save_soups(run: RunDir, members: dict[str, tuple[str, ...]]) -> None:
    """Keep the members of every domain's soup, chosen from the forest as it stands."""
    run.soups.parent.mkdir(parents=True, exist_ok=True)
    write_file(run.soups, json.dumps({"forest": _hashes(run), "members": members}, indent=2) + "\n")


def _hashes(run: RunDir) -> dict[str, str]:
    return {name: expert.content_hash for name, expert in experts(run).items()}
