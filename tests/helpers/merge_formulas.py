"""Merge methods on small matrices of plain Python floats, beside which their formulas are written out."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence

import pytest
import torch

from btm_scale.checkpoint.merge import elementwise, fusion, sparse, spherical, whole_tensor  # noqa: F401 (they register)
from btm_scale.checkpoint.merge.noise import uniform
from btm_scale.checkpoint.merge.registry import Piece, TensorPieces, find_method

ROWS, COLUMNS = 4, 6
WEIGHTS = [0.5, 1.0, 2.0]
Vector = list[float]


def draw(seed: int) -> Vector:
    source = random.Random(seed)
    return [source.gauss(0, 1) for _ in range(ROWS * COLUMNS)]


BASE, MODELS = draw(0), [draw(seed) for seed in (1, 2, 3)]
DELTAS = [[x - b for x, b in zip(model, BASE, strict=True)] for model in MODELS]
NOISE = [uniform(f"model {i}", 0, ROWS * COLUMNS).tolist() for i in range(3)]


def matrix(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).reshape(ROWS, COLUMNS)


def piece(count: int, weights: Sequence[float], rows: slice) -> Piece:
    """Return the same rows of every model."""
    return Piece(
        tensors=iter([matrix(model)[rows] for model in MODELS[:count]]),
        weights=weights,
        zeros=torch.zeros_like(matrix(BASE)[rows]),
        base=matrix(BASE)[rows],
        noise=lambda i: matrix(NOISE[i])[rows],
    )


def run(name: str, weights: Sequence[float] = WEIGHTS, **parameters: float) -> Vector:
    """Run a method on matrices; the result must not depend on how they are split into pieces."""
    results = []
    for rows in (ROWS, 3, 1):
        parts = [slice(start, start + rows) for start in range(0, ROWS, rows)]

        def pieces(parts: Sequence[slice] = parts) -> Iterator[Piece]:
            return (piece(len(weights), weights, part) for part in parts)

        merge = find_method(name).prepare(TensorPieces((ROWS, COLUMNS), pieces), parameters)
        results.append(torch.cat([merge(part) for part in pieces()]).reshape(-1).tolist())
    assert results[1] == pytest.approx(results[0], rel=1e-12)
    assert results[2] == pytest.approx(results[0], rel=1e-12)
    return results[0]


def elected(columns: Sequence[Sequence[float]], weights: Sequence[float]) -> Vector:
    """Return, per column, the weighted mean of the entries that have the sign of the column's weighted sum."""
    result = []
    for column in columns:
        sign = 1 if math.fsum(w * d for w, d in zip(weights, column, strict=True)) >= 0 else -1
        agreeing = [(w, d) for w, d in zip(weights, column, strict=True) if d * sign > 0]
        weight_sum = math.fsum(w for w, _ in agreeing)
        result.append(math.fsum(w * d for w, d in agreeing) / weight_sum if weight_sum else 0.0)
    return result


def cosine(one: Vector, other: Vector) -> float:
    product = math.fsum(a * b for a, b in zip(one, other, strict=True))
    return product / math.hypot(*one) / math.hypot(*other)
