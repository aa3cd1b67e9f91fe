"""Laws of replay: a loss as a function of what the training text consists of, and of the training tokens.

The loss is relative to the seed LM's, so that runs with different seed LMs can be fitted together. The fraction x is
that of all other domains' text for the loss on any of them, and that of the expert's own text for the loss on its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

_OFFSET = 0.02  # added to x by the D-CPT law, which is singular at 0
_POINTS, _ZOOMS = 7, 6  # of the grid along each exponent, and its refinements
_SINGULAR = 1e-12  # of the largest eigenvalue: combinations of terms that the measurements do not determine
_AT_ONCE = 20_000  # grid points x measurements that are solved together

# From exponents [grid, exponents], x [n] and relative tokens [n] to terms [grid, n, terms].
Terms = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ReplayLaw:
    """A sum of terms with coefficients."""

    name: str
    terms: Terms
    bounds: tuple[tuple[float, float], ...] = ()  # of the exponents
    needs_tokens: bool = False  # to be fitted, numbers of tokens must differ
    positive: tuple[int, ...] = (1,)  # the terms whose coefficients are at least 0

    def size(self, varied_tokens: bool) -> int:
        """Return the number of parameters, for measurements with one number of tokens or several."""
        return 3 + len(self.bounds) if self.needs_tokens else 2 + len(self.bounds) + varied_tokens

    def matrix(self, exponents: np.ndarray, shares: np.ndarray, tokens: np.ndarray, varied: bool) -> np.ndarray:
        """Return the terms [grid, n, terms]; log tokens are the last, of laws that lack tokens otherwise."""
        terms = self.terms(exponents, shares, tokens)
        if not varied or self.needs_tokens:
            return terms
        logs = np.broadcast_to(np.log(tokens)[:, None], (*terms.shape[:2], 1))
        return np.concatenate([terms, logs], axis=2)


def _falling(fixed: float | None = None) -> Terms:
    """Return the terms of c - a x^s."""

    def terms(exponents: np.ndarray, shares: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        powers = np.full((len(exponents), 1), fixed) if fixed is not None else exponents[:, :1]
        falling = -(shares**powers)
        return np.stack([np.ones_like(falling), falling], axis=2)

    return terms


def _d_cpt(exponents: np.ndarray, shares: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    eta, beta, gamma = exponents.T[:, :, None]
    data = shares**eta / tokens**beta
    return np.stack([np.ones_like(data), data, (shares + _OFFSET) ** -gamma], axis=2)


LAWS: tuple[ReplayLaw, ...] = (  # the ones with the fewest parameters first
    ReplayLaw("linear", _falling(1.0)),  # c - a x
    ReplayLaw("root", _falling(0.5)),  # c - a x^(1/2)
    ReplayLaw("power", _falling(), ((0.05, 2.0),)),  # c - a x^s
    # c + b x^eta / T^beta + a / (x + offset)^gamma (arXiv 2406.01375, at one size of the model)
    ReplayLaw("d-cpt", _d_cpt, ((0.05, 2.0), (0.05, 1.5), (0.05, 2.0)), needs_tokens=True, positive=(1, 2)),
)


@dataclass(frozen=True)
class ReplayFit:
    """A law with the parameters that fit, and those that fit all measurements but one."""

    law: ReplayLaw
    exponents: np.ndarray
    coefficients: np.ndarray
    most_tokens: float
    varied: bool  # whether the measurements have different numbers of tokens
    others: tuple[ReplayFit, ...] = ()  # without each measurement in turn
    left_out: tuple[float, ...] = ()  # each measurement as predicted without it
    error: float = 0.0  # nats per token: root mean square of the leave-one-out errors
    r2: float = 0.0  # of the same

    def loss(self, shares: np.ndarray, tokens: np.ndarray | float) -> np.ndarray:
        """Return the predicted losses [n], relative to the seed LM's, for fractions x [n] and numbers of tokens."""
        relative = np.broadcast_to(np.asarray(tokens, dtype=np.float64) / self.most_tokens, shares.shape)
        matrix = self.law.matrix(self.exponents[None], shares, relative, self.varied)[0]
        losses: np.ndarray = matrix @ self.coefficients
        return losses


def fit_replay_laws(shares: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> dict[str, ReplayFit]:
    """Fit every law that has fewer parameters than there are measurements: x [n], tokens [n] and losses [n] in nats."""
    varied = len(np.unique(tokens)) > 1
    fits = {}
    for law in LAWS:
        if law.size(varied) >= len(losses) or (law.needs_tokens and not varied):
            continue
        fit = _fitted(law, shares, tokens, losses, varied)
        others = []
        for i in range(len(losses)):
            kept = np.arange(len(losses)) != i
            others.append(_fitted(law, shares[kept], tokens[kept], losses[kept], varied))
        left_out = np.array([one.loss(shares[[i]], tokens[[i]])[0] for i, one in enumerate(others)])
        squares, total = np.sum((losses - left_out) ** 2), np.sum((losses - losses.mean()) ** 2)
        r2 = float(1.0 - squares / total) if total > 0 else 1.0
        error = float(np.sqrt(squares / len(losses)))
        fits[law.name] = replace(fit, others=tuple(others), left_out=tuple(left_out.tolist()), error=error, r2=r2)
    return fits


def best_replay_fit(fits: Mapping[str, ReplayFit]) -> ReplayFit:
    """Return the fit with the lowest leave-one-out error; of equal ones, that of the first law."""
    return min(fits.values(), key=lambda fit: fit.error)


def _fitted(law: ReplayLaw, shares: np.ndarray, tokens: np.ndarray, losses: np.ndarray, varied: bool) -> ReplayFit:
    """Search the exponents on a grid that is refined around its best point; the coefficients are least squares."""
    most = float(tokens.max())
    low, high = (np.array([bound[i] for bound in law.bounds]) for i in range(2))
    begin, end = low, high
    best = (np.inf, np.zeros(len(low)), np.zeros(0))
    for _ in range(_ZOOMS if law.bounds else 1):
        axes = [np.linspace(first, last, _POINTS) for first, last in zip(begin, end, strict=True)]
        grid = np.array(list(itertools.product(*axes)))  # without exponents, one point
        step = max(1, _AT_ONCE // len(losses))
        for first in range(0, len(grid), step):
            piece = grid[first : first + step]
            costs, coefficients = _solved(law.matrix(piece, shares, tokens / most, varied), losses, law.positive)
            at = int(np.argmin(costs))
            if costs[at] < best[0]:
                best = (float(costs[at]), piece[at], coefficients[at])
        width = (end - begin) / (_POINTS - 1)
        begin, end = np.maximum(best[1] - width, low), np.minimum(best[1] + width, high)
    return ReplayFit(law, best[1], best[2], most, varied)


def _solved(matrices: np.ndarray, losses: np.ndarray, positive: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums of squared errors [grid] and the coefficients [grid, terms] of terms [grid, n, terms].

    So that the coefficients `positive` are at least 0, every subset of their terms is solved alone, and the best
    feasible solution is kept.
    """
    grid, _, terms = matrices.shape
    costs, best = np.full(grid, np.inf), np.zeros((grid, terms))
    normal = np.einsum("gni,gnj->gij", matrices, matrices)
    targets = np.einsum("gni,n->gi", matrices, losses)
    for unused in itertools.product((False, True), repeat=len(positive)):
        absent = {column for column, is_absent in zip(positive, unused, strict=True) if is_absent}
        columns = [column for column in range(terms) if column not in absent]
        inverse = np.linalg.pinv(normal[:, columns][:, :, columns], rcond=_SINGULAR, hermitian=True)
        coefficients = np.zeros((grid, terms))
        coefficients[:, columns] = np.einsum("gij,gj->gi", inverse, targets[:, columns])
        squares = np.sum((np.einsum("gnt,gt->gn", matrices, coefficients) - losses) ** 2, axis=1)
        better = (squares < costs) & (coefficients[:, list(positive)] >= 0).all(axis=1)
        costs, best = np.where(better, squares, costs), np.where(better[:, None], coefficients, best)
    return costs, best
