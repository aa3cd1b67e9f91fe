"""The mixture with the lowest predicted mean perplexity, by an interior-point method from several starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

_BARRIERS = 10.0 ** -np.arange(3, 10)  # nats; a higher one would move a start out of its valley
_SHARPNESS = (20.0, 200.0, 2000.0)  # of the maximum in the search for a start that meets the limits
_NEWTON_STEPS = 40
_STARTS = 6
_VANISHING = 1e-4  # a weight below this is dropped

Function = Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]]  # value, gradient and Hessian at a mixture


class Surface(Protocol):
    """A predicted loss in nats over the simplex."""

    def loss(self, mixtures: np.ndarray) -> np.ndarray:
        """Return the losses [n] of mixtures [n, components]."""

    def derivatives(self, mixture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return gradient and Hessian."""


Limit = tuple[Surface, float]  # a loss, and its largest allowed value in nats


def lowest_mean(
    targets: Sequence[tuple[Surface, float]], limits: Sequence[Limit], starts: np.ndarray
) -> np.ndarray | None:
    """Return the mixture [components] with the lowest weighted mean perplexity that meets every limit, or None.

    Args:
        targets: losses with the weights of their perplexities.
        limits: losses with their largest allowed values.
        starts: [n, components], mixtures to start from, beside single components and pairs.
    """
    candidates = np.concatenate([starts, _midpoints(starts.shape[1])])
    excess = _excess(limits, candidates)
    order = np.lexsort((log_mean(targets, candidates), np.maximum(excess, 0.0)))
    center = np.full(starts.shape[1], 1.0 / starts.shape[1])
    objective = _mean_perplexity(targets)
    best: tuple[float, np.ndarray] | None = None
    for start in candidates[_first_of(order, candidates, of_corners=bool(limits))]:
        inside = _meeting(limits, 0.98 * start + 0.02 * center)
        minima = [] if inside is None else [_without_vanishing(limits, _descend(objective, limits, inside))]
        for mixture in (*minima, *([start] if meets(limits, start) else [])):
            value = objective(mixture)[0]
            if best is None or value < best[0]:
                best = value, mixture
    return None if best is None else best[1]


def _first_of(order: np.ndarray, candidates: np.ndarray, *, of_corners: bool) -> np.ndarray:
    """Return the first `_STARTS` of the candidates in their order, and `of_corners` the first near each corner.

    Limits divide the simplex, so that the best candidates may all be of one valley.
    """
    first = order[:_STARTS]
    if not of_corners:
        return first
    corners = candidates[order].argmax(axis=1)
    nearest = order[np.unique(corners, return_index=True)[1]]
    return np.concatenate([first, nearest[~np.isin(nearest, first)]])


def lowest_loss(surface: Surface, starts: np.ndarray) -> float:
    """Return the lowest value of one loss on the simplex, in nats."""
    mixture = lowest_mean([(surface, 1.0)], [], starts)
    assert mixture is not None
    return float(surface.loss(mixture[None])[0])


def meets(limits: Sequence[Limit], mixture: np.ndarray) -> bool:
    """Return whether no loss of a mixture exceeds its limit."""
    return bool(_excess(limits, mixture[None])[0] <= 0)


def log_mean(targets: Sequence[tuple[Surface, float]], mixtures: np.ndarray) -> np.ndarray:
    """Return the logarithm of the weighted mean perplexity of each mixture, [n]."""
    logs: np.ndarray = np.logaddexp.reduce([surface.loss(mixtures) + np.log(w) for surface, w in targets], axis=0)
    return logs


def _excess(limits: Sequence[Limit], mixtures: np.ndarray) -> np.ndarray:
    """Return by how much each mixture exceeds its tightest limit, [n] in nats; negative inside all."""
    if not limits:
        return np.full(len(mixtures), -np.inf)
    excess: np.ndarray = np.max([surface.loss(mixtures) - most for surface, most in limits], axis=0)
    return excess


def _mean_perplexity(targets: Sequence[tuple[Surface, float]]) -> Function:
    """Return the logarithm of the weighted mean perplexity, which has the same minimum."""
    return _log_sum_exp([(surface, float(np.log(weight))) for surface, weight in targets], 1.0)


def _log_sum_exp(terms: Sequence[tuple[Surface, float]], sharpness: float) -> Function:
    """Return log(sum_k exp(sharpness (L_k + offset_k))) / sharpness: near the maximum if it is sharp."""

    def function(mixture: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        logs = np.array([sharpness * (float(surface.loss(mixture[None])[0]) + offset) for surface, offset in terms])
        value = float(np.logaddexp.reduce(logs))
        gradient, hessian = np.zeros(len(mixture)), np.zeros((len(mixture), len(mixture)))
        for fraction, (surface, _) in zip(np.exp(logs - value), terms, strict=True):
            slope, curvature = surface.derivatives(mixture)
            gradient += fraction * slope
            hessian += fraction * (curvature + sharpness * np.outer(slope, slope))
        return value / sharpness, gradient, hessian - sharpness * np.outer(gradient, gradient)

    return function


def _meeting(limits: Sequence[Limit], start: np.ndarray) -> np.ndarray | None:
    """Return an interior point inside all limits, near `start` if that is one; None if none is found."""
    if _excess(limits, start[None])[0] < 0:
        return start
    for sharpness in _SHARPNESS:
        worst = _log_sum_exp([(surface, -most) for surface, most in limits], sharpness)
        start = _descend(worst, [], start)
        start = 0.999 * start + 0.001 / len(start)
        if _excess(limits, start[None])[0] < 0:
            return start
    return None


def _descend(function: Function, limits: Sequence[Limit], mixture: np.ndarray) -> np.ndarray:
    """Return a local minimum, by Newton's method from an interior point with decreasing barriers."""
    directions = _directions(len(mixture))
    for barrier in _BARRIERS:
        for _ in range(_NEWTON_STEPS):
            value, gradient, hessian = _with_barriers(function, limits, mixture, barrier)
            curvatures, axes = np.linalg.eigh(directions.T @ hessian @ directions)
            slopes = axes.T @ (directions.T @ gradient)
            # Absolute curvatures make it a descent direction along axes of negative curvature too.
            step = -directions @ (axes @ (slopes / np.maximum(np.abs(curvatures), 1e-9)))
            descent = float(gradient @ step)
            if descent > -1e-3 * barrier:
                break
            shrinking = step < 0
            size = min(1.0, 0.99 * float(np.min(-mixture[shrinking] / step[shrinking], initial=np.inf)))
            while size > 1e-12:
                tried = mixture + size * step
                tried /= tried.sum()  # before it is looked at: rounding can take it across a limit
                if _value(function, limits, tried, barrier) <= value + 1e-4 * size * descent:
                    break
                size /= 2.0
            else:
                break
            mixture = tried
    return mixture


def _value(function: Function, limits: Sequence[Limit], mixture: np.ndarray, barrier: float) -> float:
    if mixture.min() <= 0 or _excess(limits, mixture[None])[0] >= 0:
        return np.inf
    slacks = [most - float(surface.loss(mixture[None])[0]) for surface, most in limits]
    return function(mixture)[0] - barrier * float(np.log(mixture).sum() + np.log(slacks).sum())


def _with_barriers(
    function: Function, limits: Sequence[Limit], mixture: np.ndarray, barrier: float
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return value, gradient and Hessian of the function and the barriers before weights of 0 and the limits."""
    value, gradient, hessian = function(mixture)
    value -= barrier * float(np.log(mixture).sum())
    gradient = gradient - barrier / mixture
    hessian = hessian + np.diag(barrier / mixture**2)
    for surface, most in limits:
        slack = most - float(surface.loss(mixture[None])[0])
        slope, curvature = surface.derivatives(mixture)
        value -= barrier * float(np.log(slack))
        gradient = gradient + barrier / slack * slope
        hessian = hessian + barrier * (curvature / slack + np.outer(slope, slope) / slack**2)
    return value, gradient, hessian


def _without_vanishing(limits: Sequence[Limit], mixture: np.ndarray) -> np.ndarray:
    """Return the mixture without weights near 0, unless that breaks a limit."""
    kept = np.where(mixture < _VANISHING, 0.0, mixture)
    kept /= kept.sum()
    return kept if meets(limits, kept) else mixture


def _directions(components: int) -> np.ndarray:
    """Return an orthonormal basis [components, components - 1] of the directions that keep the sum of the weights."""
    centering = np.eye(components) - 1.0 / components
    basis: np.ndarray = np.linalg.svd(centering)[0][:, : components - 1]
    return basis


def _midpoints(components: int) -> np.ndarray:
    """Return the corners of the simplex and the middle of each edge."""
    corners = np.eye(components)
    one, other = np.triu_indices(components, 1)
    return np.concatenate([corners, (corners[one] + corners[other]) / 2.0])
