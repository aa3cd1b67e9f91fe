"""Systems of linear equations with a symmetric positive definite matrix.

NumPy factors such a matrix but does not solve with the factor, and its solver for any matrix takes over twice as long.
"""

from __future__ import annotations

import numpy as np

_BLOCK = 64  # rows and columns; products of larger blocks are no faster, and their factors are


def solve_positive_definite(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the solution [n, k] of `matrix` [n, n] times it = `right` [n, k], in float64.

    `matrix` is overwritten. Raises `numpy.linalg.LinAlgError` if it is not positive definite.
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
