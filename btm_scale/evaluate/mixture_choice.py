"""Choose the weights of a mixture from measured ones: the lowest predicted perplexity that meets every limit.

The perplexity that is minimized is that of a model trained on the mixture, and limits are on that of the average, which
forgets more. Without a seed LM both are the average's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from btm_scale.evaluate.mixture_trained import Related, trained_losses
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
    names = sorted(names)
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
    fits = {name: chosen(fitted) for name, fitted in laws.items()}
    total = sum(goal.targets.values())
    targets = {name: weight / total for name, weight in goal.targets.items()}
    alone = {one: _measured_at(mixtures, losses, index) for index, one in enumerate(names)}
    seed = alone.get(SEED, {})
    if goal.keep and not seed:
        raise UserError("--keep compares with the seed LM, whose loss could not be measured. Leave --keep out.")
    limits: list[Limit] = [(fits[name], seed[name] + math.log(ratio)) for name, ratio in goal.keep.items()]
    trained = trained_losses(fits, names, related or {}) if seed else {}
    objective = [((trained or fits)[name], weight) for name, weight in targets.items()]
    weights = lowest_mean(objective, limits, mixtures)
    if weights is None:
        raise UserError(_infeasible(fits, seed, goal, mixtures))
    if trained:
        weights = _without_needless_replay(objective, limits, weights, names.index(SEED))
    means = np.sum([weight * np.exp(losses[name]) for name, weight in targets.items()], axis=0)
    uniform = int(np.argmin(np.abs(mixtures - 1.0 / len(names)).sum(axis=1)))
    samples = _resampled(fits, mixtures, losses, weights, random_seed)
    predicted = {name: float(perplexities(fit.loss(weights[None]))[0]) for name, fit in fits.items()}
    both = np.stack([weights, np.full(len(names), 1.0 / len(names))])
    by_training = {name: perplexities(surface.loss(both)) for name, surface in trained.items()}
    perplexity = {
        name: Predicted(
            predicted=predicted[name],
            interval=_interval(samples[name], predicted[name]),
            seed=math.exp(seed[name]) if seed else None,
            uniform=math.exp(losses[name][uniform]),
            **_training(by_training.get(name)),
        )
        for name in fits
    }
    mean = sum(weight * predicted[name] for name, weight in targets.items())
    return ChosenMixture(
        random_seed=random_seed,
        targets=targets,
        keep=dict(goal.keep),
        weights=dict(zip(names, weights.tolist(), strict=True)),
        domains={},
        outside={},
        mean=Predicted(
            predicted=mean,
            interval=_interval(np.sum([w * samples[name] for name, w in targets.items()], axis=0), mean),
            seed=sum(w * math.exp(seed[name]) for name, w in targets.items()) if seed else None,
            uniform=float(means[uniform]),
            **_training(np.sum([w * by_training[name] for name, w in targets.items()], axis=0) if trained else None),
        ),
        perplexity=perplexity,
        fit={name: _described(fit, laws[name]) for name, fit in fits.items()},
        measured=tuple(
            MixturePerplexity(
                weights=measured[i].weights,
                mean=float(means[i]),
                perplexity={name: math.exp(values[i]) for name, values in losses.items()},
                predicted={name: float(perplexities(fit.left_out[i])) for name, fit in fits.items()},
            )
            for i in np.argsort(means, kind="stable").tolist()
        ),
        nearest=float(np.abs(mixtures - weights).sum(axis=1).min() / 2.0),
        extrapolated=tuple(name for name, fit in fits.items() if _is_outside(fit, mixtures, weights)),
    )


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


def _measured_at(mixtures: np.ndarray, losses: Mapping[str, np.ndarray], corner: int) -> dict[str, float]:
    """Return the losses of one model alone; empty if it was not measured, because it diverged."""
    (rows,) = np.nonzero(mixtures[:, corner] == 1.0)
    return {name: float(values[rows[0]]) for name, values in losses.items()} if len(rows) else {}


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


def _training(pair: np.ndarray | None) -> dict[str, float]:
    """Return the fields of `Predicted` for models that are trained on the chosen mixture and on the uniform one."""
    return {} if pair is None else {"trained": float(pair[0]), "trained_uniform": float(pair[1])}


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


def _infeasible(fits: Mapping[str, Fit], seed: Mapping[str, float], goal: MixtureGoal, mixtures: np.ndarray) -> str:
    """Return the message for limits that no mixture meets, with the lowest ratio that is predicted for each alone."""
    lowest = {name: math.exp(lowest_loss(fits[name], mixtures) - seed[name]) for name in goal.keep}
    limits = ",".join(f"{name}={ratio:g}" for name, ratio in goal.keep.items())
    ratios = ", ".join(f"{name} {ratio:.3f}" for name, ratio in lowest.items())
    return (
        f"No mixture is predicted to meet --keep {limits}. The lowest ratio to the seed LM's perplexity that a mixture "
        f"reaches, for each alone, is {ratios}. Raise --keep, or leave one of the domains out."
    )
