"""Predict how much replay an expert needs: the smallest share of other domains' text that keeps the loss on it.

Runs that trained the expert with different branch.replay show its losses on dev text; laws are fitted to them (D-CPT,
arXiv 2406.01375). The critical mixture ratio (arXiv 2407.17467) is the largest fraction of the expert's own text with
which the perplexity on every other text stays within its tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from btm_scale.errors import UserError
from btm_scale.evaluate.mixture_record import CriticalReplay, LawFit, ReplayedRun, TextFit
from btm_scale.evaluate.replay_law import ReplayFit, best_replay_fit, fit_replay_laws
from btm_scale.evaluate.replayed_runs import replayed_runs
from btm_scale.run_dir import RunDir

_LEAST_SHARES = 3
_SHARES = 2001  # that are tried between the smallest and the largest measured


def critical_replay(
    runs: Sequence[RunDir], target: str, keep: Mapping[str, float], tokens: int | None = None, split: str = "dev"
) -> CriticalReplay:
    """Return the smallest share of other domains' text for the expert `target` that is predicted to meet every limit.

    Args: `keep`, by domain the largest allowed ratio of its perplexity to the seed LM's; `tokens`, the expert's
    training tokens (default: the most of the runs); `split`, of the domains' text.

    Raises UserError for fewer than three shares, limits that no share between the measured ones is predicted to meet,
    and other numbers of tokens if all runs have the same; ForestError as `replayed_runs` does.
    """
    measured = replayed_runs(runs, [target, *(name for name in keep if name != target)], target, split)
    shares = np.unique(measured.shares)
    if len(shares) < _LEAST_SHARES:
        has = ", ".join(f"{share:g}" for share in shares)
        raise UserError(
            f"The runs trained '{target}' with {len(shares)} shares of other domains' text ({has}). A law of replay "
            f"needs at least {_LEAST_SHARES}. Train more with --set experts.{target}.branch.replay=FRACTION, and name "
            "them with --replay."
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
        raise UserError(_infeasible(fits, target, limits, tried, at))
    replay = found / measured.other
    if replay >= 1.0:
        raise UserError(
            f"{found:.3f} of the text of '{target}' must be of other domains, and in {runs[0].root} only "
            f"{measured.other:.3f} of what is replayed is. Raise --keep, or name a run first whose parents read "
            "less of this domain."
        )
    others = [
        _smallest_without({name: fit.others[i] for name, fit in fits.items()}, target, limits, tried, at)
        for i in range(len(measured.runs))
    ]
    return CriticalReplay(
        target=target,
        keep=dict(keep),
        tokens=at,
        share=found,
        replay=replay,
        ratio=1.0 - found,
        range=(min(*others, found), max(*others, found)),
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
                share=float(measured.shares[i]),
                replay=float(measured.replay[i]),
                tokens=int(measured.tokens[i]),
                perplexity={name: math.exp(losses[i]) for name, losses in measured.losses.items()},
                predicted={name: math.exp(fit.left_out[i]) for name, fit in fits.items()},
            )
            for i in range(len(measured.runs))
        ),
        is_smallest=found == tried[0],
        extrapolated=not measured.tokens.min() <= at <= most,
    )


def _fraction(text: str, target: str, shares: np.ndarray) -> np.ndarray:
    """Return the law's x of a text's loss: the fraction of the expert's own text, or of all other text."""
    return 1.0 - shares if text == target else shares


def _smallest(
    fits: Mapping[str, ReplayFit], target: str, limits: Mapping[str, float], tried: np.ndarray, tokens: int
) -> float | None:
    """Return the smallest share that meets every limit, or None if there is none.

    Every limit on other text is also met by all larger shares: more of it should not help and then hurt. More of it
    raises the loss on the expert's own text, so its limit is met at that share alone.
    """
    meets = {
        name: fits[name].loss(_fraction(name, target, tried), tokens) <= limit + 1e-12 for name, limit in limits.items()
    }
    own = meets.pop(target, np.ones(len(tried), dtype=bool))
    broken = np.flatnonzero(~np.all(list(meets.values()), axis=0)) if meets else np.array([], dtype=int)
    first = int(broken[-1]) + 1 if len(broken) else 0
    found = np.flatnonzero(own[first:])
    return float(tried[first + found[0]]) if len(found) else None


def _smallest_without(
    fits: Mapping[str, ReplayFit], target: str, limits: Mapping[str, float], tried: np.ndarray, tokens: int
) -> float:
    """Return the smallest share by the fits without one run, which may not meet every limit."""
    found = _smallest(fits, target, limits, tried, tokens)
    if found is None:  # the share that other text needs, whatever the expert's own domain loses
        found = _smallest(
            fits, target, {name: limit for name, limit in limits.items() if name != target}, tried, tokens
        )
    # Other text whose limit no share meets needs more than all that are known.
    return float(tried[-1]) if found is None else found


def _infeasible(
    fits: Mapping[str, ReplayFit], target: str, limits: Mapping[str, float], tried: np.ndarray, tokens: int
) -> str:
    best, shares = {}, {}
    for name in limits:
        losses = fits[name].loss(_fraction(name, target, tried), tokens)
        best[name], shares[name] = float(losses.min()), float(tried[np.argmin(losses)])
    asked = ",".join(f"{name}={math.exp(limit):g}" for name, limit in limits.items())
    reached = ", ".join(f"{name} {math.exp(best[name]):.3f} with {shares[name]:.3f}" for name in limits)
    missed = [name for name, limit in limits.items() if best[name] > limit + 1e-12]
    remedy = "Raise --keep, or train with more replay."
    if not missed:
        remedy = "Each can be met, but not together. Raise one of the limits."
    elif target in missed:
        remedy = f"Raise the limit of {target}, or train it with less replay or on more tokens."
    return (
        f"No share of other domains' text from {tried[0]:g} to {tried[-1]:g}, those of the runs, is predicted to meet "
        f"--keep {asked}. The lowest ratios to the seed LM's perplexity, each with its own share, are {reached}. "
        f"{remedy}"
    )
