"""Routers in closed form: one row per expert and layer, computed from the experts' sums without training or torch."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from threading import Lock

import numpy as np
from threadpoolctl import threadpool_limits

from btm_scale.checkpoint.merge.moe import ComputedRouter
from btm_scale.errors import ForestError
from btm_scale.forest.router_sums import RouterSums
from btm_scale.model.hf_names import table
from btm_scale.model.shape import ModelShape
from btm_scale.util.cholesky import solve_positive_definite
from btm_scale.util.pools import CORES

_RIDGE = 1e-3  # of the covariance's mean diagonal, so that few tokens suffice
_ROWS = 64  # of a product that stays in a core's cache
_MOST_BYTES = 384 << 20  # of the processes that fit layers, each with a matrix of float64 [hidden, hidden]
_FITTED_BYTES = 1 / 110  # of copies that take as long as to fit a layer, times hidden^3
_one_gate = Lock()  # at a time in a process: each takes a matrix [hidden, hidden], and the number of BLAS's threads
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


def computed(kind: str, shape: ModelShape, experts: Sequence[RouterSums]) -> ComputedRouter:
    """Return a router of a mixture, with gates of float32 [experts, hidden].

    `kind` is one of ROUTERS but `random`, which needs no sums, and `fitted-routed`, which needs the mixture.
    """
    key = hashlib.sha256(json.dumps([kind, *(expert.of for expert in experts)]).encode()).hexdigest()
    gate = functools.partial(_gate, kind, gate_names(shape), experts)
    if kind != "fitted":
        return ComputedRouter(key, gate, at_once=CORES)
    at_once = max(1, _MOST_BYTES // (8 * shape.hidden**2))
    return ComputedRouter(key, gate, at_once, int(_FITTED_BYTES * shape.hidden**3))


def one_blas_thread() -> threadpool_limits:
    """Use one thread per call of BLAS in this context, so that results do not depend on the machine's cores."""
    return threadpool_limits(1, user_api="blas")


def _gate(kind: str, names: Sequence[str], experts: Sequence[RouterSums], name: str) -> np.ndarray:
    """Return the gate of this name; `names` are those of all layers."""
    with _one_gate, one_blas_thread():
        return _rows(kind, names.index(name), experts).astype("<f4")


def _rows(kind: str, layer: int, experts: Sequence[RouterSums]) -> np.ndarray:
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
