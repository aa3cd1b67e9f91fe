"""Routers in closed form: one row per expert and layer, computed from the experts' sums without training or torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from threadpoolctl import threadpool_limits

from btm_scale.errors import ForestError
from btm_scale.forest.router_sums import RouterSums
from btm_scale.model.hf_names import table
from btm_scale.model.shape import ModelShape
from btm_scale.util.cholesky import solve_positive_definite
from btm_scale.util.pools import CORES, in_threads

_RIDGE = 1e-3  # of the covariance's mean diagonal, so that few tokens suffice
_MOST_BYTES = 384 << 20  # of the layers that are fitted at once, each with a matrix of float64 [hidden, hidden]
_ROWS = 64  # of a product that stays in a core's cache
_NOTHING_TO_FIT = (
    "The inputs of an MLP are zero, or always the same, for all text that a router is fitted to. Check how the experts "
    "were trained, or draw the router: --router random"
)


def fitted(means: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the rows [experts, hidden] of linear discriminant analysis on a layer's inputs.

    `means` [experts, hidden] are the mean inputs of each expert's domains. `second` [hidden, hidden], which is
    overwritten, is the mean of the experts' second moments. Both are float64.

    Expert j's logit is log p(x | domain j), up to what all have in common, for Gaussians with one covariance S: with
    the means m_j and their mean m, (x - (m_j + m) / 2) S^-1 (m_j - m). A gate has no bias, so the constant is added
    through the direction whose product with m is 1 and which varies the least otherwise: S^-1 m, scaled.

    Raises ForestError if the inputs have no covariance or no mean, as those of a layer whose norm has weights of zero.
    """
    mean, within, weighted = means.mean(axis=0), second, means.T / len(means)
    for start in range(0, len(within), _ROWS):
        within[start : start + _ROWS] -= weighted[start : start + _ROWS] @ means
    within[np.diag_indices(len(mean))] += _RIDGE * within.diagonal().mean()
    try:
        *rows, direction = solve_positive_definite(within, np.stack([*(means - mean), mean], axis=1)).T
    except np.linalg.LinAlgError:
        raise ForestError(_NOTHING_TO_FIT) from None
    if not direction @ mean > 0:
        raise ForestError(_NOTHING_TO_FIT)
    constants = -0.5 * ((means + mean) * rows).sum(axis=1)
    return np.stack(rows) + constants[:, None] * (direction / (direction @ mean))


def hidden(means: np.ndarray) -> np.ndarray:
    """Return the rows of mergekit-moe's `hidden` gates: each domain's mean input, less that of all, of norm 1."""
    centered = means - means.mean(axis=0)
    return centered / np.maximum(np.linalg.norm(centered, axis=1, keepdims=True), 1e-12)


def gates(kind: str, shape: ModelShape, experts: Sequence[RouterSums]) -> dict[str, np.ndarray]:
    """Return the gate of every layer of a mixture under its Hugging Face name: float32 [experts, hidden].

    `kind` is one of ROUTERS but `random`, which needs no sums, and `fitted-routed`, which needs the mixture.
    """
    at_once = _MOST_BYTES // (8 * shape.hidden**2)
    names = gate_names(shape)
    with one_blas_thread():
        rows = in_threads(lambda layer: _gate(kind, layer, experts), range(len(names)), at_once=min(CORES, at_once))
    return {name: row.astype("<f4") for name, row in zip(names, rows, strict=True)}


def one_blas_thread() -> threadpool_limits:
    """Use one thread per call of BLAS in this context, so that results do not depend on the machine's cores."""
    return threadpool_limits(1, user_api="blas")


def _gate(kind: str, layer: int, experts: Sequence[RouterSums]) -> np.ndarray:
    if kind == "embedding":
        return np.stack([expert.embedding for expert in experts])
    means = np.stack([expert.mean(layer) for expert in experts])
    if kind == "hidden":
        return hidden(means)
    second = np.zeros((means.shape[1], means.shape[1]))
    for expert in experts:
        expert.add_second(layer, second)
    second /= len(experts)
    return fitted(means, second)


def gate_names(shape: ModelShape) -> list[str]:
    """Return the Hugging Face names of the gates, by layer."""
    return [entry.huggingface[0] for entry in table(shape) if entry.megatron.endswith(".router.weight")]
