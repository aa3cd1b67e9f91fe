"""The loss of a model that is trained on a mixture, predicted from the law of averages.

An average forgets: experts of other domains pull it away from what the seed LM and the text's own expert know. A model
that is trained on the mixture reads text of that domain again and again. So its loss on a text is taken to be the
lowest of three: that of the average, the lowest on the line from the average to the seed LM, and what the text's own
expert would reach with so much less text, if its gain over the seed LM grows with the square root of the text. Only if
the mixture has hardly any text of the domain, the loss is that of the average.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from btm_scale.evaluate.mixture_law import Fit, Law
from btm_scale.forest.expert import Expert
from btm_scale.run_dir import SEED

# Both were chosen on trained mixtures of the demo's domains (benchmarks/mixtures.py). Exponents from 0.3 to 1 and
# fractions from 0.001 to 0.02 rank them about as well.
_EXPONENT = 0.5  # of the fraction of a domain's text, in the gain
_REHEARSED = 0.01  # the fraction of a domain's text at which 1/e of the forgetting remains

Related = Mapping[str, Mapping[str, float]]  # by text and model: the fraction of its training text of that domain
Derivatives = tuple[float, np.ndarray, np.ndarray]  # value, gradient and Hessian


@dataclass(frozen=True)
class TrainedLoss:
    """A surface of predicted losses in nats over the simplex, like `Fit`."""

    law: Law
    parameters: np.ndarray  # [size], of the law of averages
    seed: int  # index of the seed LM
    related: np.ndarray  # [components]: the fraction of each model's training text that is of the text's own domain

    def loss(self, mixtures: np.ndarray) -> np.ndarray:
        """Return the predicted losses [n] of models that are trained on mixtures [n, components]."""
        averages = self.law.loss(self.parameters, mixtures)
        near_seed = self.law.loss(self.parameters, self._nearest_the_seed(mixtures)[0])
        kept = np.minimum(near_seed, self._learned(mixtures))
        losses: np.ndarray = kept + self._forgotten(mixtures) * (averages - kept)
        return losses

    def derivatives(self, mixture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return gradient and Hessian."""
        average, slope, curvature = self._average_at(mixture)
        kept, kept_slope, kept_curvature = min(
            self._near_seed_at(mixture), self._learned_at(mixture), key=lambda derivatives: derivatives[0]
        )
        forgotten = float(self._forgotten(mixture[None])[0])
        rate = -self.related / _REHEARSED
        change = np.outer(rate, slope - kept_slope)
        gradient = kept_slope + forgotten * (slope - kept_slope + (average - kept) * rate)
        hessian = kept_curvature + forgotten * (
            curvature - kept_curvature + change + change.T + (average - kept) * np.outer(rate, rate)
        )
        return gradient, hessian

    def _forgotten(self, mixtures: np.ndarray) -> np.ndarray:
        """Return which part of what the average forgets a trained model forgets too, [n]."""
        forgotten: np.ndarray = np.exp(-(mixtures @ self.related) / _REHEARSED)
        return forgotten

    def _average_at(self, mixture: np.ndarray) -> Derivatives:
        return float(self.law.loss(self.parameters, mixture[None])[0]), *self.law.derivatives(self.parameters, mixture)

    def _learned(self, mixtures: np.ndarray) -> np.ndarray:
        """Return the losses [n] by the text of the domain alone."""
        seed, gain, related = self._own_expert()
        fraction = np.minimum(mixtures @ self.related / related, 1.0)
        losses: np.ndarray = seed - gain * fraction**_EXPONENT
        return losses

    def _learned_at(self, mixture: np.ndarray) -> Derivatives:
        seed, gain, related = self._own_expert()
        fraction, rate = float(mixture @ self.related) / related, self.related / related
        if not 0.0 < fraction < 1.0:
            flat = np.zeros_like(mixture)
            return float(self._learned(mixture[None])[0]), flat, np.outer(flat, flat)
        gained = gain * fraction**_EXPONENT
        slope = -_EXPONENT * gained / fraction
        curvature = (_EXPONENT - 1.0) * slope / fraction
        return seed - gained, slope * rate, curvature * np.outer(rate, rate)

    def _own_expert(self) -> tuple[float, float, float]:
        """Return the seed LM's loss, what the best related model gains over it, and the related part of its text."""
        alone = self.law.loss(self.parameters, np.eye(len(self.related)))
        is_expert = (self.related > 0) & (np.arange(len(self.related)) != self.seed)
        best = int(np.argmin(np.where(is_expert, alone, np.inf))) if is_expert.any() else self.seed
        return float(alone[self.seed]), max(float(alone[self.seed] - alone[best]), 0.0), self.related[best] or 1.0

    def _nearest_the_seed(self, mixtures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the points with the lowest loss between mixtures and the seed LM, and how far these are, [n] in 0..1.

        Along a line the polynomials are parabolas, and the exponential law is monotonic.
        """
        seed = np.eye(mixtures.shape[1])[self.seed]

        def loss(way: np.ndarray) -> np.ndarray:
            losses: np.ndarray = self.law.loss(self.parameters, mixtures + way[:, None] * (seed - mixtures))
            return losses

        begin, middle, end = (loss(np.full(len(mixtures), way)) for way in (0.0, 0.5, 1.0))
        curvature = 2.0 * (begin - 2.0 * middle + end)
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex = (curvature - (end - begin)) / (2.0 * curvature)
        vertex = np.where(curvature > 0, np.clip(vertex, 0.0, 1.0), 0.0)
        ways = np.stack([np.zeros_like(vertex), np.ones_like(vertex), vertex])
        way = ways[np.argmin([begin, end, loss(vertex)], axis=0), np.arange(len(mixtures))]
        return mixtures + way[:, None] * (seed - mixtures), way

    def _near_seed_at(self, mixture: np.ndarray) -> Derivatives:
        points, ways = self._nearest_the_seed(mixture[None])
        way = float(ways[0])
        value, slope, curvature = self._average_at(points[0])
        gradient, hessian = (1.0 - way) * slope, (1.0 - way) ** 2 * curvature
        line = np.eye(len(mixture))[self.seed] - mixture
        bend = float(line @ curvature @ line)
        if 0.0 < way < 1.0 and bend > 0:  # the lowest point moves with the mixture; a straight line has none
            mixed = (1.0 - way) * curvature @ line - slope
            hessian = hessian - np.outer(mixed, mixed) / bend
        return value, gradient, hessian


def trained_losses(fits: Mapping[str, Fit], names: Sequence[str], related: Related) -> dict[str, TrainedLoss]:
    """Return the predicted loss of trained models by text; the models `names` include the seed LM.

    A text that is absent from `related` is taken to be of the domain of the model that alone predicts it best.
    """
    surfaces = {}
    for text, fit in fits.items():
        alone = fit.loss(np.eye(len(names)))
        shares = related.get(text) or {names[int(np.argmin(alone))]: 1.0}
        fractions = np.array([shares.get(name, 0.0) for name in names])
        surfaces[text] = TrainedLoss(fit.law, fit.parameters, names.index(SEED), fractions)
    return surfaces


def related_models(texts: Sequence[str], cards: Mapping[str, Expert]) -> Related:
    """Return the models that read a domain's text, for those `texts` that are domains with such models."""
    return {
        text: by_model
        for text in texts
        if (by_model := {name: card.domains[text] for name, card in cards.items() if card.domains.get(text)})
    }
