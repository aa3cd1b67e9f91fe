"""Predict how much replayed text an expert needs: the smallest share that keeps the loss on other text.

Runs that trained the expert with different replay shares show its losses on dev text; laws are fitted to them (D-CPT,
arXiv 2406.01375). The critical mixture ratio (arXiv 2407.17467) is the largest fraction of the expert's own text with
which the perplexity on every other text stays within its tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from btm_scale.errors import ForestError, UserError
from btm_scale.evaluate.mixture_record import CriticalReplay, LawFit, ReplayedRun, TextFit
from btm_scale.evaluate.replay_law import ReplayFit, best_replay_fit, fit_replay_laws
from btm_scale.forest.expert import find_expert
from btm_scale.forest.scores import Scores
from btm_scale.run_dir import SEED, RunDir

_LEAST_SHARES = 3
_SHARES = 2001  # that are tried between the smallest and the largest measured


@dataclass(frozen=True)
class _Measured:
    """The experts of several runs on one domain, those with the smallest replay share first."""

    runs: tuple[str, ...]
    shares: np.ndarray  # replayed fraction of each expert's text
    tokens: np.ndarray  # that each was trained on
    losses: dict[str, np.ndarray]  # by text: nats per token, less those of the run's seed LM


def critical_replay(
    runs: Sequence[RunDir], target: str, keep: Mapping[str, float], tokens: int | None = None, split: str = "dev"
) -> CriticalReplay:
    """Return the smallest replay share of the expert `target` that is predicted to meet every limit.

    Args: `keep`, by domain the largest allowed ratio of its perplexity to the seed LM's; `tokens`, the expert's
    training tokens (default: the most of the runs); `split`, of the domains' text.

    Raises UserError for fewer than three replay shares, limits that no measured share is predicted to meet, and other
    numbers of tokens if all runs have the same; ForestError for missing scores and for different text.
    """
    measured = _measured(runs, [target, *(name for name in keep if name != target)], target, split)
    shares = np.unique(measured.shares)
    if len(shares) < _LEAST_SHARES:
        has = ", ".join(f"{share:g}" for share in shares)
        raise UserError(
            f"The runs trained '{target}' with {len(shares)} replay shares ({has}). A law of replay needs at least "
            f"{_LEAST_SHARES}. Train more with --set experts.{target}.branch.replay=SHARE, and name them with --replay."
        )
    most = int(measured.tokens.max())
    at = most if tokens is None else tokens
    if at != most and len(np.unique(measured.tokens)) == 1:
        raise UserError(
            f"--tokens {at}: all runs trained '{target}' on {most} tokens, so nothing is known of other numbers. "
            f"Leave --tokens out, or add runs with another experts.{target}.tokens."
        )
    laws = {
        name: fit_replay_laws(_fraction(name, target, measured.shares), measured.tokens, losses)
        for name, losses in measured.losses.items()
    }
    if not all(laws.values()):
        raise UserError(
            f"{len(measured.runs)} runs with different numbers of tokens are too few for every law of replay. Add runs "
            "with --replay, or compare runs with the same number of tokens."
        )
    fits = {name: best_replay_fit(fitted) for name, fitted in laws.items()}
    tried = np.linspace(shares[0], shares[-1], _SHARES)
    limits = {name: math.log(ratio) for name, ratio in keep.items()}
    found = _smallest(fits, target, limits, tried, at)
    if found is None:
        raise UserError(_infeasible(fits, target, keep, tried, at))
    others = [
        _smallest({name: fit.others[i] for name, fit in fits.items()}, target, limits, tried, at)
        for i in range(len(measured.runs))
    ]
    # A fit whose limits no share meets puts the critical one above all that are known.
    spread = [tried[-1] if one is None else one for one in others] + [found]
    return CriticalReplay(
        target=target,
        keep=dict(keep),
        tokens=at,
        replay=found,
        ratio=1.0 - found,
        range=(min(spread), max(spread)),
        perplexity={
            name: float(np.exp(fit.loss(_fraction(name, target, np.array([found])), at)[0]))
            for name, fit in fits.items()
        },
        fit={
            name: TextFit(
                law=fit.law.name,
                error=fit.error,
                r2=fit.r2,
                laws={law: LawFit(error=one.error, r2=one.r2) for law, one in laws[name].items()},
            )
            for name, fit in fits.items()
        },
        measured=tuple(
            ReplayedRun(
                run=measured.runs[i],
                replay=float(measured.shares[i]),
                tokens=int(measured.tokens[i]),
                perplexity={name: math.exp(losses[i]) for name, losses in measured.losses.items()},
                predicted={name: math.exp(fit.left_out[i]) for name, fit in fits.items()},
            )
            for i in range(len(measured.runs))
        ),
        is_smallest=found == tried[0],
        extrapolated=not measured.tokens.min() <= at <= most,
    )


def _measured(runs: Sequence[RunDir], texts: Sequence[str], target: str, split: str) -> _Measured:
    names, shares, tokens = [], [], []
    losses: dict[str, list[float]] = {name: [] for name in texts}
    fingerprints: dict[str, str] = {}
    for run in runs:
        expert = find_expert(run.model(target))
        if expert is None:
            raise ForestError(f"'{target}' is not a finished expert of {run.root}. Train it, or leave this run out.")
        if target not in expert.domains:
            raise ForestError(
                f"'{target}' of {run.root} was trained on {', '.join(expert.domains) or 'unknown text'}, not on the "
                "domain of its name. Leave this run out."
            )
        names.append(run.root.name)
        shares.append(1.0 - expert.domains[target])
        tokens.append(expert.tokens)
        for text in texts:
            scores, seed = (Scores.load(run.scores(model, text, split)) for model in (target, SEED))
            if fingerprints.setdefault(text, scores.fingerprint) != scores.fingerprint or (
                seed.fingerprint != scores.fingerprint
            ):
                raise ForestError(
                    f"The {split} text of '{text}' in {run.root} differs from that of {runs[0].root}, or from what its "
                    "seed LM was scored on. Compare runs with the same text, tokenizer and random_seed."
                )
            forgotten = _loss(scores) - _loss(seed)
            if not math.isfinite(forgotten):
                raise ForestError(f"'{target}' of {run.root} has no finite loss on '{text}'. Leave this run out.")
            losses[text].append(forgotten)
    rounded = np.round(shares, 6)  # 1 - 0.9 and 0.1 are one share
    order = np.lexsort((np.array(names), np.array(tokens), rounded))
    return _Measured(
        tuple(names[i] for i in order),
        rounded[order],
        np.array(tokens, dtype=np.int64)[order],
        {name: np.array(values)[order] for name, values in losses.items()},
    )


def _loss(scores: Scores) -> float:
    counted = scores.log_probs if scores.counted is None else scores.log_probs[scores.counted]
    return -float(counted.mean(dtype=np.float64))


def _fraction(text: str, target: str, shares: np.ndarray) -> np.ndarray:
    """Return the fraction of the text that replaces or is replaced, for each replay share."""
    return 1.0 - shares if text == target else shares


def _smallest(
    fits: Mapping[str, ReplayFit], target: str, limits: Mapping[str, float], tried: np.ndarray, tokens: int
) -> float | None:
    """Return the smallest share from which on every limit is met, or None if the largest does not meet them."""
    meets = np.ones(len(tried), dtype=bool)
    for name, limit in limits.items():
        meets &= fits[name].loss(_fraction(name, target, tried), tokens) <= limit + 1e-12
    if not meets[-1]:
        return None
    broken = np.flatnonzero(~meets)
    return float(tried[broken[-1] + 1 if len(broken) else 0])


def _infeasible(
    fits: Mapping[str, ReplayFit], target: str, keep: Mapping[str, float], tried: np.ndarray, tokens: int
) -> str:
    ratios = {name: math.exp(fits[name].loss(_fraction(name, target, tried[-1:]), tokens)[0]) for name in keep}
    limits = ",".join(f"{name}={ratio:g}" for name, ratio in keep.items())
    reached = ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items())
    return (
        f"No replay share up to {tried[-1]:g}, the largest of the runs, is predicted to meet --keep {limits}. With it, "
        f"the ratio to the seed LM's perplexity is {reached}. Raise --keep, or train with more replay."
    )
