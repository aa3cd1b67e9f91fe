"""Routers in closed form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from btm_scale.errors import ForestError
from btm_scale.forest import router
from btm_scale.forest.router import fitted


def test_the_fitted_rows_are_the_log_odds_of_gaussians_with_one_covariance() -> None:
    torch.manual_seed(0)
    root = torch.randn(6, 6, dtype=torch.float64)
    covariance = root @ root.t() + torch.eye(6, dtype=torch.float64)
    means = torch.randn(3, 6, dtype=torch.float64) + 2
    second = torch.stack([covariance + mean.outer(mean) for mean in means]).mean(dim=0)
    rows = torch.from_numpy(fitted(means.numpy(), second.numpy()))
    logits = means @ rows.t()
    exact = torch.distributions.MultivariateNormal(means[:, None], covariance).log_prob(means[None]).t()
    # Without a bias, the constants are exact at the mean only.
    assert logits.argmax(dim=1).equal(exact.argmax(dim=1))
    mean = means.mean(dim=0)
    at_mean = torch.distributions.MultivariateNormal(means, covariance).log_prob(mean)
    difference = (rows @ mean) - at_mean
    torch.testing.assert_close(difference - difference.mean(), torch.zeros(3, dtype=torch.float64), atol=0.05, rtol=0)


@pytest.mark.parametrize("second", [np.zeros((4, 4)), np.eye(4), np.full((4, 4), np.nan)])
def test_inputs_that_are_zero_on_average_or_always_are_refused(second: np.ndarray) -> None:
    with pytest.raises(ForestError, match=r"inputs of an MLP are zero.*--router random"):
        fitted(np.zeros((2, 4)), second)


def test_layers_are_fitted_with_one_blas_thread_each_whatever_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []

    def gate(kind: str, layer: int, experts: object) -> np.ndarray:
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return np.full((2, 8), layer + 0.5)

    monkeypatch.setattr(router, "_gate", gate)
    monkeypatch.setattr(router, "gate_names", lambda shape: ["first", "second", "third"])
    shape: Any = SimpleNamespace(hidden=8)
    with threadpool_limits(4, user_api="blas"):
        gates = router.gates("fitted", shape, [])
    assert {name: rows[0, 0] for name, rows in gates.items()} == {"first": 0.5, "second": 1.5, "third": 2.5}
    assert set(threads) == {1}
