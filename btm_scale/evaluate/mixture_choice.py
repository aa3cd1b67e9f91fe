"""Choose the weights of a mixture from measured ones: the lowest predicted perplexity that meets every limit.

The perplexity that is minimized is that of a model trained on the mixture, and limits are on that of the average, which
forgets more. Without a seed LM both are the average's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from btm_scale.errors import UserError
from btm_scale.evaluate.ablate import Text
from btm_scale.evaluate.mixture_law import LAWS, Fit, chosen, fit_laws, needed
from btm_scale.evaluate.mixture_optimum import Limit, Surface, log_mean, lowest_loss, lowest_mean, meets
from btm_scale.evaluate.mixture_record import (
    ChosenMixture,
    LawFit,
    MeasuredMixture,
    MixturePerplexity,
    Predicted,
    TextFit,
    perplexities,
)
from btm_scale.evaluate.mixture_runs import Mixture
from btm_scale.evaluate.mixture_trained import Related, TrainedLoss, trained_losses
from btm_scale.forest.expert import read_expert
from btm_scale.run_dir import SEED, RunDir

_RESAMPLES = 400
_OUTER = (2.5, 97.5)  # percentiles
_EQUAL = 1e-6  # nats


@dataclass(frozen=True)
class MixtureGoal:
    """The objective and the limits for choosing a mixture."""

    targets: Mapping[str, float]  # text: weight of its perplexity in the mean that is minimized
    keep: Mapping[str, float]  # text: the largest allowed ratio of its perplexity to the seed LM's

    def require_valid(self, names: Sequence[str]) -> None:
        """Raise UserError unless all numbers are positive, and with limits the models `names` include the seed LM."""
        for option, numbers in (("target", self.targets), ("keep", self.keep)):
            for name, number in numbers.items():
                if not (0 < number < math.inf):
                    raise UserError(f"--{option} {name}={number:g}: the number must be positive and finite.")
        if self.keep and SEED not in names:
            raise UserError("--keep compares with the seed LM, and this run has none. Leave --keep out.")


def choose(
    measured: Sequence[MeasuredMixture],
    texts: Mapping[str, Text],
    names: Sequence[str],
    goal: MixtureGoal,
    random_seed: int = 0,
    related: Related | None = None,
) -> ChosenMixture:
    """Return the mixture of the models `names` with the lowest predicted mean perplexity over the targets.

    The order of `measured` and `names` changes nothing. `related` is that of `trained_losses`. `domains` and `outside`
    are empty: see `domain_weights`. Raises UserError if there are too few measured mixtures, or if no mixture meets
    `goal.keep`.
    """
    fitted = _fit(measured, texts, sorted(names))
    largest = max(goal.targets.values())  # their sum may overflow
    total = sum(weight / largest for weight in goal.targets.values())
    targets = {name: weight / largest / total for name, weight in goal.targets.items()}
    if goal.keep and not fitted.seed:
        raise UserError("--keep compares with the seed LM, whose loss could not be measured. Leave --keep out.")
    trained = trained_losses(fitted.fits, fitted.names, related or {}) if fitted.seed else {}
    objective = [((trained or fitted.fits)[name], weight) for name, weight in targets.items() if weight > 0]
    limits = [(fitted.fits[name], fitted.seed[name] + math.log(ratio)) for name, ratio in goal.keep.items()]
    weights = lowest_mean(objective, limits, fitted.mixtures)
    if weights is None:
        raise UserError(_infeasible(fitted, goal))
    if trained:
        weights = _without_needless_replay(objective, limits, weights, fitted.names.index(SEED))
    mean, perplexity = _predicted(fitted, trained, targets, weights, random_seed)
    return ChosenMixture(
        random_seed=random_seed,
        targets=targets,
        keep=dict(goal.keep),
        weights=dict(zip(fitted.names, weights.tolist(), strict=True)),
        domains={},
        outside={},
        mean=mean,
        perplexity=perplexity,
        fit={name: _described(fit, fitted.laws[name]) for name, fit in fitted.fits.items()},
        measured=fitted.measured_perplexities(targets),
        nearest=float(np.abs(fitted.mixtures - weights).sum(axis=1).min() / 2.0),
        extrapolated=tuple(name for name, fit in fitted.fits.items() if _is_outside(fit, fitted.mixtures, weights)),
    )


@dataclass(frozen=True)
class _Fitted:
    """Measured mixtures, and the laws that are fitted to their losses on each text."""

    names: list[str]  # of the models
    mixtures: np.ndarray  # [n, models]
    losses: dict[str, np.ndarray]  # by text, nats [n]
    laws: dict[str, dict[str, Fit]]  # by text and law

    @cached_property
    def fits(self) -> dict[str, Fit]:
        """The best law of each text."""
        return {name: chosen(fitted) for name, fitted in self.laws.items()}

    @cached_property
    def seed(self) -> dict[str, float]:
        """The measured losses of the seed LM by text; empty without one, or if it diverged."""
        if SEED not in self.names:
            return {}
        (rows,) = np.nonzero(self.mixtures[:, self.names.index(SEED)] == 1.0)
        return {name: float(values[rows[0]]) for name, values in self.losses.items()} if len(rows) else {}

    @cached_property
    def uniform(self) -> int:
        """Row of the uniform mixture."""
        return int(np.argmin(np.abs(self.mixtures - 1.0 / len(self.names)).sum(axis=1)))

    def measured_perplexities(self, targets: Mapping[str, float]) -> tuple[MixturePerplexity, ...]:
        """Return the measured mixtures, the one with the lowest mean perplexity over the targets first."""
        means = np.sum([weight * np.exp(self.losses[name]) for name, weight in targets.items()], axis=0)
        return tuple(
            MixturePerplexity(
                weights={
                    name: weight for name, weight in zip(self.names, self.mixtures[i].tolist(), strict=True) if weight
                },
                mean=float(means[i]),
                perplexity={name: math.exp(values[i]) for name, values in self.losses.items()},
                predicted={name: float(perplexities(fit.left_out[i])) for name, fit in self.fits.items()},
            )
            for i in np.argsort(means, kind="stable").tolist()
        )


def _fit(measured: Sequence[MeasuredMixture], texts: Mapping[str, Text], names: list[str]) -> _Fitted:
    """Fit all laws. Raises UserError if there are too few measured mixtures for any."""
    measured = sorted(measured, key=lambda one: one.key)
    mixtures = np.array([[one.weights.get(name, 0.0) for name in names] for one in measured]).reshape(-1, len(names))
    losses = {
        name: np.array([one.losses[text.fingerprint] for one in measured], dtype=np.float64)
        for name, text in texts.items()
    }
    laws = {name: fit_laws(mixtures, values) for name, values in losses.items()}
    if not all(laws.values()):
        raise UserError(
            f"{len(measured)} measured mixtures do not determine any law of {len(names)} models, which takes at least "
            f"{needed(LAWS[0], len(names))} in general position. Raise --runs."
        )
    return _Fitted(names, mixtures, losses, laws)


def _predicted(
    fitted: _Fitted,
    trained: Mapping[str, TrainedLoss],
    targets: Mapping[str, float],
    weights: np.ndarray,
    random_seed: int,
) -> tuple[Predicted, dict[str, Predicted]]:
    """Return the predicted perplexities of a mixture: the mean over the targets, and by text."""
    mixtures = np.stack([weights, np.full(len(weights), 1.0 / len(weights))])
    samples = _resampled(fitted.fits, fitted.mixtures, fitted.losses, weights, random_seed)
    by_text = {}
    for name, fit in fitted.fits.items():
        average = float(perplexities(fit.loss(weights[None]))[0])
        training = perplexities(trained[name].loss(mixtures)).tolist() if trained else (None, None)
        by_text[name] = Predicted(
            predicted=average,
            interval=_interval(samples[name], average),
            seed=math.exp(fitted.seed[name]) if fitted.seed else None,
            uniform=math.exp(fitted.losses[name][fitted.uniform]),
            trained=training[0],
            trained_uniform=training[1],
        )

    def mean(field: str) -> Any:
        values = [getattr(by_text[name], field) for name in targets]
        return None if None in values else float(np.dot(list(targets.values()), values))

    fields = ("predicted", "seed", "uniform", "trained", "trained_uniform")
    means = {field: mean(field) for field in fields}
    sampled = np.sum([weight * samples[name] for name, weight in targets.items()], axis=0)
    return Predicted(interval=_interval(sampled, means["predicted"]), **means), by_text


def domain_weights(run: RunDir, weights: Mapping[str, float], known: Sequence[str]) -> tuple[dict[str, float], Mixture]:
    """Return each domain's fraction of the text of a mixture of models, and the models with other text.

    A model contributes the text that it was trained on; that of the seed LM is replayed. The text of a model counts
    only if all of it is of the domains `known`.
    """
    domains: dict[str, float] = {}
    outside: dict[str, float] = {}
    for model, weight in weights.items():
        trained_on = read_expert(run.model(model)).domains
        if not trained_on or not set(trained_on) <= set(known):
            if weight > 0:
                outside[model] = weight
            continue
        for domain, fraction in trained_on.items():
            domains[domain] = domains.get(domain, 0.0) + weight * fraction
    return {domain: domains[domain] for domain in known if domain in domains}, outside


def _without_needless_replay(
    objective: Sequence[tuple[Surface, float]], limits: Sequence[Limit], weights: np.ndarray, seed: int
) -> np.ndarray:
    """Return the mixture without the seed LM if that is as good: training may be predicted to need none of its text."""
    if weights[seed] == 1.0:
        return weights
    others = weights.copy()
    others[seed] = 0.0
    others /= others.sum()
    before, after = log_mean(objective, np.stack([weights, others]))
    return others if after <= before + _EQUAL and meets(limits, others) else weights


def _described(fit: Fit, laws: Mapping[str, Fit]) -> TextFit:
    errors = {name: LawFit(error=one.error, r2=one.r2) for name, one in laws.items()}
    return TextFit(law=fit.law.name, error=fit.error, r2=fit.r2, laws=errors)


def _resampled(
    fits: Mapping[str, Fit],
    mixtures: np.ndarray,
    losses: Mapping[str, np.ndarray],
    weights: np.ndarray,
    random_seed: int,
) -> dict[str, np.ndarray]:
    """Return each text's bootstrap perplexities [resamples]: laws refitted to resampled errors, plus one error each."""
    draws = np.random.default_rng(random_seed).integers(len(mixtures), size=(_RESAMPLES, len(mixtures) + 1))
    samples = {}
    for name, fit in fits.items():
        parameters = fit.resampled(mixtures, losses[name], draws[:, 1:])
        errors = losses[name] - fit.left_out
        resampled = fit.law.loss(parameters, weights[None])[:, 0] + (errors - errors.mean())[draws[:, 0]]
        samples[name] = perplexities(resampled)
    return samples


def _interval(samples: np.ndarray, predicted: float) -> tuple[float, float]:
    low, high = np.percentile(samples, _OUTER).tolist()
    return min(low, predicted), max(high, predicted)


def _is_outside(fit: Fit, mixtures: np.ndarray, weights: np.ndarray) -> bool:
    return bool(fit.leverages(weights[None], mixtures)[0] > fit.leverages(mixtures, mixtures).max() + 1e-9)


def _infeasible(fitted: _Fitted, goal: MixtureGoal) -> str:
    """Return the message for limits that no mixture meets, with the lowest ratio that is predicted for each alone."""
    lowest = {name: math.exp(lowest_loss(fitted.fits[name], fitted.mixtures) - fitted.seed[name]) for name in goal.keep}
    limits = ",".join(f"{name}={ratio:g}" for name, ratio in goal.keep.items())
    ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in lowest.items())
    return (
        f"No mixture is predicted to meet --keep {limits}. The lowest ratio to the seed LM's perplexity that a mixture "
        f"reaches, for each alone, is {ratios}. Raise --keep, or leave one of the domains out."
    )
