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
_POINTS = 7  # of the grid along each exponent
_STARTS, _STEPS = 8, 60  # of Levenberg-Marquardt, from the best points of the grid
_SETTLED = 1e-8  # relative change of the squared errors in a step
_DIFFERENCE = 1e-5  # of an exponent, for derivatives
_SINGULAR = 1e-12  # of the largest eigenvalue: combinations of terms that the measurements do not determine

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
    left_out: tuple[float, ...] = ()  # each measurement as predicted without it; of the first and last x, with it
    error: float = 0.0  # nats per token: root mean square of the leave-one-out errors
    r2: float = 0.0  # of the same

    def loss(self, shares: np.ndarray, tokens: np.ndarray | float) -> np.ndarray:
        """Return the predicted losses [n], relative to the seed LM's, for fractions x [n] and numbers of tokens."""
        relative = np.broadcast_to(np.asarray(tokens, dtype=np.float64) / self.most_tokens, shares.shape)
        matrix = self.law.matrix(self.exponents[None], shares, relative, self.varied)[0]
        losses: np.ndarray = matrix @ self.coefficients
        return losses


def fit_replay_laws(shares: np.ndarray, tokens: np.ndarray, losses: np.ndarray) -> dict[str, ReplayFit]:
    """Fit every law that has fewer parameters than there are measurements: x [n], tokens [n] and losses [n] in nats.

    A measurement counts in the errors if others have a smaller and a larger x, or the same. The laws are used between
    measurements, and without the first one nothing shows how steep the loss is there.
    """
    varied = len(np.unique(tokens)) > 1
    inside = np.array([_is_inside(shares, i) for i in range(len(shares))])
    fits = {}
    for law in LAWS:
        if law.size(varied) >= len(losses) or (law.needs_tokens and not varied):
            continue
        fit = _fitted(law, shares, tokens, losses, varied)
        others = []
        for i in range(len(losses)):
            kept = np.arange(len(losses)) != i
            others.append(_fitted(law, shares[kept], tokens[kept], losses[kept], varied))
        without = np.array([one.loss(shares[[i]], tokens[[i]])[0] for i, one in enumerate(others)])
        left_out = np.where(inside, without, fit.loss(shares, tokens))
        square, variance = np.mean((losses - left_out)[inside] ** 2), np.var(losses)
        r2 = float(1.0 - square / variance) if variance > 0 else 1.0
        error = float(np.sqrt(square))
        fits[law.name] = replace(fit, others=tuple(others), left_out=tuple(left_out.tolist()), error=error, r2=r2)
    return fits


def _is_inside(shares: np.ndarray, place: int) -> bool:
    others = np.delete(shares, place)
    return bool(len(others) and others.min() <= shares[place] <= others.max())


def best_replay_fit(fits: Mapping[str, ReplayFit]) -> ReplayFit:
    """Return the fit with the lowest leave-one-out error; of equal ones, that of the first law."""
    return min(fits.values(), key=lambda fit: fit.error)


def _fitted(law: ReplayLaw, shares: np.ndarray, tokens: np.ndarray, losses: np.ndarray, varied: bool) -> ReplayFit:
    """Search the exponents on a grid, and descend from its best points; the coefficients are least squares."""
    most = float(tokens.max())

    def solved(exponents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return coefficients [points, terms] and errors [points, n] of exponents [points, exponents]."""
        return _solved(law.matrix(exponents, shares, tokens / most, varied), losses, law.positive)

    axes = [np.linspace(low, high, _POINTS) for low, high in law.bounds]
    grid = np.array(list(itertools.product(*axes)))  # without exponents, one point
    if law.bounds:
        grid = _descended(grid[np.argsort(_costs(solved(grid)[1]))[:_STARTS]], law.bounds, lambda one: solved(one)[1])
    coefficients, errors = solved(grid)
    best = int(np.argmin(_costs(errors)))
    return ReplayFit(law, grid[best], coefficients[best], most, varied)


def _descended(
    starts: np.ndarray, bounds: Sequence[tuple[float, float]], errors_of: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return local minima [points, exponents] of the squared errors within bounds, by Levenberg-Marquardt.

    The coefficients follow the exponents (variable projection), so exponents that make up for each other are no
    obstacle. `errors_of` gives the errors [points, n] of exponents [points, exponents].
    """
    low, high = np.array(bounds).T
    points, damping = starts, np.full(len(starts), 1e-2)
    errors = errors_of(points)
    for _ in range(_STEPS):
        differences = np.where(points < high, _DIFFERENCE, -_DIFFERENCE)
        moved = points[:, None] + differences[:, :, None] * np.eye(len(low))  # [points, exponents moved, exponents]
        changed = errors_of(moved.reshape(-1, len(low))).reshape(*moved.shape[:2], -1) - errors[:, None]
        jacobian = (changed / differences[:, :, None]).transpose(0, 2, 1)
        slopes = np.einsum("gne,gn->ge", jacobian, errors)
        leaves = ((points <= low) & (slopes > 0)) | ((points >= high) & (slopes < 0))
        jacobian, slopes = np.where(leaves[:, None], 0.0, jacobian), np.where(leaves, 0.0, slopes)
        normal = np.einsum("gni,gnj->gij", jacobian, jacobian)
        scale = np.maximum(np.einsum("gii->gi", normal), 1e-12)
        normal += (damping[:, None] * scale + leaves)[:, :, None] * np.eye(len(low))
        tried = np.clip(points - np.linalg.solve(normal, slopes[:, :, None])[:, :, 0], low, high)
        tried_errors = errors_of(tried)
        gained = _costs(errors) - _costs(tried_errors)
        better = gained > 0
        settled = np.abs(gained) <= _SETTLED * _costs(errors)
        points = np.where(better[:, None], tried, points)
        errors = np.where(better[:, None], tried_errors, errors)
        damping = np.where(better, damping / 4.0, damping * 4.0).clip(1e-9, 1e9)
        if settled.all():
            break
    return points


def _costs(errors: np.ndarray) -> np.ndarray:
    costs: np.ndarray = np.sum(errors**2, axis=1)
    return costs


def _solved(matrices: np.ndarray, losses: np.ndarray, positive: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients [points, terms] and the errors [points, n] of terms [points, n, terms].

    So that the coefficients `positive` are at least 0, every subset of their terms is solved alone, and the best
    feasible solution is kept.
    """
    points, n, terms = matrices.shape
    best, errors = np.zeros((points, terms)), np.full((points, n), np.inf)
    normal = np.einsum("gni,gnj->gij", matrices, matrices)
    targets = np.einsum("gni,n->gi", matrices, losses)
    for unused in itertools.product((False, True), repeat=len(positive)):
        absent = {column for column, is_absent in zip(positive, unused, strict=True) if is_absent}
        columns = [column for column in range(terms) if column not in absent]
        inverse = np.linalg.pinv(normal[:, columns][:, :, columns], rcond=_SINGULAR, hermitian=True)
        coefficients = np.zeros((points, terms))
        coefficients[:, columns] = np.einsum("gij,gj->gi", inverse, targets[:, columns])
        found = np.einsum("gnt,gt->gn", matrices, coefficients) - losses
        better = (_costs(found) < _costs(errors)) & (coefficients[:, list(positive)] >= 0).all(axis=1)
        best, errors = np.where(better[:, None], coefficients, best), np.where(better[:, None], found, errors)
    return best, errors
