"""Read what runs that trained an expert with different amounts of replay show: its text, and its losses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError
from btm_scale.forest.branch import replayed_fraction
from btm_scale.forest.expert import Expert, find_expert, read_expert
from btm_scale.forest.scores import Scores
from btm_scale.run_dir import SEED, RunDir


@dataclass(frozen=True)
class ReplayedRuns:
    """The experts of several runs on one domain, those with the smallest share of other domains' text first."""

    runs: tuple[str, ...]
    shares: np.ndarray  # of other domains' text in each expert's
    replay: np.ndarray  # branch.replay, larger than the share where the parents also read the expert's domain
    tokens: np.ndarray  # that each was trained on
    losses: dict[str, np.ndarray]  # by text: nats per token, less those of the run's seed LM
    other: float  # fraction of the replayed text of the run that is named first that is of other domains


def replayed_runs(runs: Sequence[RunDir], texts: Sequence[str], target: str, split: str) -> ReplayedRuns:
    """Return what the finished runs show of the expert `target` on a split of `texts`.

    Raises ForestError for missing or outdated scores, different text, and runs whose replay adds no other text.
    """
    names, shares, others, tokens = [], [], [], []
    losses: dict[str, list[float]] = {name: [] for name in texts}
    fingerprints: dict[str, str] = {}
    for run in runs:
        expert, seed = _trained_on(run, target), read_expert(run.model(SEED))
        names.append(run.root.name)
        shares.append(1.0 - expert.domains[target])
        others.append(_other_text(run, expert))
        tokens.append(expert.tokens)
        for text in texts:
            ours, before = (_scores(run, model, text, split) for model in (expert, seed))
            if fingerprints.setdefault(text, ours.fingerprint) != ours.fingerprint or (
                before.fingerprint != ours.fingerprint
            ):
                raise ForestError(
                    f"The {split} text of '{text}' in {run.root} differs from that of {runs[0].root}, or from what its "
                    "seed LM was scored on. Compare runs with the same text, tokenizer and random_seed."
                )
            # Scores of an earlier version lack it.
            counted = next((one.counted for one in (ours, before) if one.counted is not None), None)
            forgotten = _loss(ours, counted) - _loss(before, counted)
            if not math.isfinite(forgotten):
                raise ForestError(f"'{target}' of {run.root} has no finite loss on '{text}'. Leave this run out.")
            losses[text].append(forgotten)
    rounded = np.round(shares, 6)  # 1 - 0.9 and 0.1 are one share
    order = np.lexsort((np.array(names), np.array(tokens), rounded))
    return ReplayedRuns(
        tuple(names[i] for i in order),
        rounded[order],
        np.round(rounded / np.array(others), 6)[order],
        np.array(tokens, dtype=np.int64)[order],
        {name: np.array(values)[order] for name, values in losses.items()},
        others[0],
    )


def _trained_on(run: RunDir, target: str) -> Expert:
    expert = find_expert(run.model(target))
    if expert is None:
        raise ForestError(f"'{target}' is not a finished expert of {run.root}. Train it, or leave this run out.")
    if target not in expert.domains:
        raise ForestError(
            f"'{target}' of {run.root} was trained on {', '.join(expert.domains) or 'unknown text'}, not on the "
            "domain of its name. Leave this run out."
        )
    if not expert.tokens:
        raise ForestError(
            f"'{target}' of {run.root} took no training step, and the laws are of training tokens. Leave this run out."
        )
    return expert


def _other_text(run: RunDir, expert: Expert) -> float:
    other = 1.0 - replayed_fraction(RunConfig.load(run.config), run, expert.parents, expert.name)
    if other < 1e-6:
        raise ForestError(
            f"The parents of '{expert.name}' in {run.root} were trained on its own domain alone, so replay adds no "
            "other text. Leave this run out."
        )
    return other


def _scores(run: RunDir, model: Expert, text: str, split: str) -> Scores:
    scores = Scores.load(run.scores(model.name, text, split))
    if scores.model != model.scored_hash:
        raise ForestError(
            f"'{model.name}' of {run.root} was scored on '{text}' before it was trained again. Score it: btm-scale "
            f"score {run.root}"
        )
    return scores


def _loss(scores: Scores, counted: np.ndarray | None) -> float:
    log_probs = scores.log_probs if counted is None else scores.log_probs[counted]
    return -float(log_probs.mean(dtype=np.float64))
