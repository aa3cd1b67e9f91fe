"""Laws of data mixtures: the loss on one text as a function of the weights of a mixture, fitted by least squares.

A mixture is a point w [components] on the simplex. The linear and quadratic laws are Scheffe's polynomials, which have
no intercept because the weights sum to 1; the exponential law is that of arXiv 2403.16952.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

_SINGULAR = 1e-9  # of 1 - leverage: a mixture without which a law is not determined
_PRIOR = 1e-4  # precision of a parameter before anything is measured
_STEPS = 100  # of Levenberg-Marquardt
_SETTLED = 1e-8  # relative decrease of the sum of squares in a step
_OFFSETS = (0.05, 0.5, 5.0)  # of the exponential law's asymptote below the lowest loss, in ranges of the losses


class Law(ABC):
    """A family of functions from a mixture to a loss in nats per token."""

    name: ClassVar[str]

    @abstractmethod
    def size(self, components: int) -> int:
        """Return the number of parameters."""

    @abstractmethod
    def fit(self, mixtures: np.ndarray, losses: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Return the parameters [..., size] that fit losses [..., n] of mixtures [n, components].

        `start`: parameters of similar losses, from which an iterative fit begins.
        """

    @abstractmethod
    def loss(self, parameters: np.ndarray, mixtures: np.ndarray) -> np.ndarray:
        """Return the losses [..., n] of mixtures [n, components] by parameters [..., size]."""

    @abstractmethod
    def derivatives(self, parameters: np.ndarray, mixture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradient [components] and the Hessian [components, components] of the loss by the weights."""

    @abstractmethod
    def features(self, parameters: np.ndarray, mixtures: np.ndarray) -> np.ndarray:
        """Return the derivatives [n, size] of the losses of mixtures by the parameters."""

    @abstractmethod
    def left_out(self, mixtures: np.ndarray, losses: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        """Return each mixture's loss [n] as predicted by the parameters that fit all others."""


class Linear(Law):
    """L(w) = sum_j c_j w_j."""

    name = "linear"

    def size(self, components: int) -> int:
        """One parameter per component."""
        return components

    def terms(self, mixtures: np.ndarray) -> np.ndarray:
        """Return the regressors that the parameters multiply, [..., size]."""
        return mixtures

    def products(self, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return the inner products [n, m] of the terms of mixtures [n, components] and others [m, components]."""
        products: np.ndarray = ones @ others.T
        return products

    def uncertainty(self, measured: np.ndarray, candidates: np.ndarray) -> np.ndarray:
        """Return the variance [n] of a prediction for each candidate, in variances of a measured loss.

        The candidate with the largest is the next to measure (D-optimal design). Solves for the parameters or, while
        there are fewer mixtures, in the dual form: x'(X'X + pI)^-1 x = (x'x - x'X'(XX' + pI)^-1 Xx) / p.
        """
        if len(measured) >= self.size(measured.shape[1]):
            known, terms = self.terms(measured), self.terms(candidates)
            precision = known.T @ known + _PRIOR * np.eye(known.shape[1])
            return np.einsum("ni,in->n", terms, np.linalg.solve(precision, terms.T))
        between = self.products(candidates, measured)
        kernel = self.products(measured, measured) + _PRIOR * np.eye(len(measured))
        explained = np.einsum("ni,in->n", between, np.linalg.solve(kernel, between.T))
        variances: np.ndarray = (np.diagonal(self.products(candidates, candidates)) - explained) / _PRIOR
        return variances

    def fit(self, mixtures: np.ndarray, losses: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Solve the linear least squares problem."""
        solution: np.ndarray = losses @ np.linalg.pinv(self.terms(mixtures)).T
        return solution

    def loss(self, parameters: np.ndarray, mixtures: np.ndarray) -> np.ndarray:
        """Return the polynomial's values."""
        losses: np.ndarray = parameters @ self.terms(mixtures).T
        return losses

    def derivatives(self, parameters: np.ndarray, mixture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the coefficients and a Hessian of zeros."""
        return parameters, np.zeros((len(mixture), len(mixture)))

    def features(self, parameters: np.ndarray, mixtures: np.ndarray) -> np.ndarray:
        """Return the terms, which do not depend on the parameters."""
        return self.terms(mixtures)

    def left_out(self, mixtures: np.ndarray, losses: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        """Return the leave-one-out losses in closed form, by the leverages."""
        rest = 1.0 - leverages(self.terms(mixtures), self.terms(mixtures))
        residuals = losses - self.loss(fitted, mixtures)
        with np.errstate(divide="ignore", invalid="ignore"):
            return losses - np.where(rest > _SINGULAR, residuals / rest, np.inf)


class Quadratic(Linear):
    """L(w) = sum_j c_j w_j + sum_{i<j} q_ij w_i w_j."""

    name = "quadratic"

    def size(self, components: int) -> int:
        """One parameter per component and per pair of components."""
        return components * (components + 1) // 2

    def terms(self, mixtures: np.ndarray) -> np.ndarray:
        """Return the weights and their products."""
        one, other = np.triu_indices(mixtures.shape[-1], 1)
        return np.concatenate([mixtures, mixtures[..., one] * mixtures[..., other]], axis=-1)

    def products(self, ones: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Return the inner products of the weights and of their products, without the m(m-1)/2 products themselves."""
        linear = super().products(ones, others)
        return linear + (linear**2 - ones**2 @ (others**2).T) / 2.0

    def derivatives(self, parameters: np.ndarray, mixture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return c + Q w and Q, which is symmetric with zeros on its diagonal."""
        components = len(mixture)
        products = np.zeros((components, components))
        products[np.triu_indices(components, 1)] = parameters[components:]
        products += products.T
        return parameters[:components] + products @ mixture, products


class Exponential(Law):
    """L(w) = c + exp(sum_j t_j w_j); a factor before the exponential would only add to every t, as weights sum to 1."""

    name = "exponential"

    def size(self, components: int) -> int:
        """One parameter per component, and the asymptote."""
        return components + 1

    def fit(self, mixtures: np.ndarray, losses: np.ndarray, start: np.ndarray | None = None) -> np.ndarray:
        """Iterate from `start`, or from several asymptotes below the losses, of which the best is returned."""
        batch = np.atleast_2d(losses)
        starts = (
            [np.broadcast_to(start, (len(batch), len(start)))] if start is not None else self._starts(mixtures, batch)
        )
        everything = np.ones_like(batch)
        fitted = [_levenberg_marquardt(self, mixtures, batch, everything, one) for one in starts]
        best = np.argmin([cost for _, cost in fitted], axis=0)
        parameters = np.stack([parameters for parameters, _ in fitted])[best, np.arange(len(batch))]
        return parameters.reshape(*losses.shape[:-1], -1)

    def loss(self, parameters: np.ndarray, mixtures: np.ndarray) -> np.ndarray:
        """Return the law's values."""
        return parameters[..., :1] + _exp(parameters[..., 1:] @ mixtures.T)

    def derivatives(self, parameters: np.ndarray, mixture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return e t and e t t', where e is the exponential."""
        slopes = parameters[1:]
        height = _exp(slopes @ mixture)
        return height * slopes, height * np.outer(slopes, slopes)

    def features(self, parameters: np.ndarray, mixtures: np.ndarray) -> np.ndarray:
        """Return 1 and the exponential times each weight, [..., n, size] for parameters [..., size]."""
        heights = _exp(parameters[..., 1:] @ mixtures.T)[..., None]
        return np.concatenate([np.ones_like(heights), heights * mixtures], axis=-1)

    def left_out(self, mixtures: np.ndarray, losses: np.ndarray, fitted: np.ndarray) -> np.ndarray:
        """Fit once per mixture, starting from the fit to all."""
        n = len(losses)
        start = np.broadcast_to(fitted, (n, len(fitted)))
        parameters, _ = _levenberg_marquardt(self, mixtures, np.tile(losses, (n, 1)), 1.0 - np.eye(n), start)
        return np.diagonal(self.loss(parameters, mixtures)).copy()

    def _starts(self, mixtures: np.ndarray, batch: np.ndarray) -> list[np.ndarray]:
        lowest = batch.min(axis=1, keepdims=True)
        spread = np.maximum(np.ptp(batch, axis=1, keepdims=True), 1e-9)
        inverse = np.linalg.pinv(mixtures).T
        asymptotes = [lowest - offset * spread for offset in _OFFSETS]
        return [np.concatenate([below, np.log(batch - below) @ inverse], axis=1) for below in asymptotes]


LAWS: tuple[Law, ...] = (Linear(), Exponential(), Quadratic())  # the one with the fewest parameters first


@dataclass(frozen=True)
class Fit:
    """A law with the parameters that fit measured mixtures, and its leave-one-out error."""

    law: Law
    parameters: np.ndarray  # [size]
    left_out: np.ndarray  # nats [n]: each mixture's loss by the fit to the others; of a component alone, to all
    error: float  # nats: root mean square error of `left_out` over mixtures of several components
    r2: float  # of the same

    def loss(self, mixtures: np.ndarray) -> np.ndarray:
        """Return the predicted losses [n] of mixtures [n, components] in nats."""
        return self.law.loss(self.parameters, mixtures)

    def derivatives(self, mixture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the gradient and the Hessian of the predicted loss."""
        return self.law.derivatives(self.parameters, mixture)

    def leverages(self, mixtures: np.ndarray, measured: np.ndarray) -> np.ndarray:
        """Return the leverage of each mixture, [n]: the variance of its prediction, in variances of a measured loss."""
        features = self.law.features(self.parameters, measured)
        return leverages(self.law.features(self.parameters, mixtures), features)

    def resampled(self, measured: np.ndarray, losses: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return bootstrap parameters [samples, size]: fits to predicted losses plus resampled leave-one-out errors.

        `draws`, int [samples, n], has the mixture whose error each measured mixture gets.
        """
        errors = losses - self.left_out
        resampled = self.loss(measured) + (errors - errors.mean())[draws]
        return self.law.fit(measured, resampled, self.parameters)


def needed(law: Law, components: int) -> int:
    """Return how many measured mixtures a law needs: one more than it has parameters."""
    return law.size(components) + 1


def fit_laws(mixtures: np.ndarray, losses: np.ndarray) -> dict[str, Fit]:
    """Fit every law for which there are enough mixtures [n, components] to their losses [n] in nats.

    A law that they do not determine is absent. A component alone is never left out, as no other mixture shows what it
    is: its loss remains in every fit.
    """
    fits: dict[str, Fit] = {}
    is_mixed = mixtures.max(axis=1) < 1.0
    if not is_mixed.any():
        return fits
    for law in LAWS:
        if len(losses) >= needed(law, mixtures.shape[1]):
            parameters = law.fit(mixtures, losses)
            left_out = np.where(is_mixed, law.left_out(mixtures, losses, parameters), law.loss(parameters, mixtures))
            if np.isfinite(left_out).all():
                squares = float(np.sum((losses - left_out)[is_mixed] ** 2))
                total = float(np.sum((losses - losses[is_mixed].mean())[is_mixed] ** 2))
                r2 = 1.0 - squares / total if total > 0 else 1.0
                fits[law.name] = Fit(law, parameters, left_out, float(np.sqrt(squares / is_mixed.sum())), r2)
    return fits


def chosen(fits: Mapping[str, Fit]) -> Fit:
    """Return the fit with the lowest leave-one-out error; of equal ones, that with the fewest parameters."""
    return min(fits.values(), key=lambda fit: (fit.error, len(fit.parameters)))


def leverages(features: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """Return x' (X'X)^-1 x of each row x of `features` [n, size]; X is `measured` [fitted, size]."""
    rows = features @ np.linalg.pinv(measured)
    return np.einsum("ni,ni->n", rows, rows)


def _exp(exponent: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(exponent, 50.0))


def _levenberg_marquardt(
    law: Exponential, mixtures: np.ndarray, losses: np.ndarray, counted: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return parameters [batch, size] and their sums of squared errors [batch].

    Args:
        law: the law to fit.
        mixtures: [n, components].
        losses: [batch, n].
        counted: [batch, n], 0 for a loss that is left out and else 1.
        start: [batch, size].
    """
    parameters = start.copy()
    damping = np.full(len(losses), 1e-3)
    residuals = counted * (law.loss(parameters, mixtures) - losses)
    cost = np.sum(residuals**2, axis=1)
    diagonal = np.arange(parameters.shape[1])
    is_settled = np.zeros(len(losses), dtype=bool)
    for _ in range(_STEPS):
        slopes = counted[..., None] * law.features(parameters, mixtures)
        normal = np.einsum("bni,bnj->bij", slopes, slopes)
        scale = np.maximum(normal[:, diagonal, diagonal], 1e-12)
        normal[:, diagonal, diagonal] += damping[:, None] * scale
        gradient = np.einsum("bni,bn->bi", slopes, residuals)
        tried = parameters - np.linalg.solve(normal, gradient[..., None])[..., 0]
        tried_residuals = counted * (law.loss(tried, mixtures) - losses)
        tried_cost = np.sum(tried_residuals**2, axis=1)
        is_better = tried_cost < cost
        is_settled |= is_better & (cost - tried_cost <= _SETTLED * cost) | (damping > 1e10)
        parameters = np.where(is_better[:, None], tried, parameters)
        residuals = np.where(is_better[:, None], tried_residuals, residuals)
        cost = np.where(is_better, tried_cost, cost)
        damping = np.clip(np.where(is_better, damping / 5.0, damping * 4.0), 1e-12, 1e12)
        if is_settled.all():
            break
    return parameters, cost
