"""Systems with a symmetric positive definite matrix."""

from __future__ import annotations

import numpy as np
import pytest

from btm_scale.util.cholesky import solve_positive_definite


@pytest.mark.parametrize("size", [1, 3, 64, 65, 200])
def test_the_solution_is_that_of_any_solver(size: int) -> None:
    draw = np.random.default_rng(size)
    root = draw.standard_normal((size, size + 4))
    matrix, right = root @ root.T + 0.1 * np.eye(size), draw.standard_normal((size, 5))
    expected = np.linalg.solve(matrix, right)
    solution = solve_positive_definite(matrix.copy(), right)
    np.testing.assert_allclose(matrix @ solution, right, atol=1e-9)
    np.testing.assert_allclose(solution, expected, rtol=1e-6, atol=1e-9)


def test_a_matrix_with_a_negative_eigenvalue_has_no_factor() -> None:
    matrix = np.eye(100)
    matrix[80, 80] = -1
    with pytest.raises(np.linalg.LinAlgError):
        solve_positive_definite(matrix, np.ones((100, 1)))
