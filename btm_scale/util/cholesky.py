"""Systems of linear equations with a symmetric positive definite matrix.

NumPy factors such a matrix but does not solve with the factor, and its solver for any matrix takes over twice as long.
"""

from __future__ import annotations

import numpy as np

_BLOCK = 64  # rows and columns; larger blocks spend more time on their inverses than they save in products


def solve_positive_definite(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Solve `matrix` @ x = `right` for x; shapes [n, n], [n, k] and [n, k], in float64.

    Uses a Cholesky decomposition in blocks, which overwrites `matrix`. Raises `numpy.linalg.LinAlgError` if that is not
    positive definite.
    """
    blocks = [slice(start, min(start + _BLOCK, len(matrix))) for start in range(0, len(matrix), _BLOCK)]
    inverses = []
    for own in blocks:  # a column of blocks at a time, of the lower triangle
        before, below = slice(0, own.start), slice(own.stop, None)
        matrix[own.start :, own] -= matrix[own.start :, before] @ matrix[own, before].T
        matrix[own, own] = np.linalg.cholesky(matrix[own, own])
        inverses.append(np.linalg.solve(matrix[own, own], np.eye(own.stop - own.start)))
        matrix[below, own] = matrix[below, own] @ inverses[-1].T
    solution = right.astype("<f8")
    for own, inverse in zip(blocks, inverses, strict=True):
        before = slice(0, own.start)
        solution[own] = inverse @ (solution[own] - matrix[own, before] @ solution[before])
    for own, inverse in zip(reversed(blocks), reversed(inverses), strict=True):
        below = slice(own.stop, None)
        solution[own] = inverse.T @ (solution[own] - matrix[below, own].T @ solution[below])
    return solution
