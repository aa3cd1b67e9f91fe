"""Routers in closed form."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from btm_scale.errors import ForestError
from btm_scale.forest import router
from btm_scale.forest.router import fitted
from btm_scale.forest.router_sums import RouterSums


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

    def rows(kind: str, layer: int, experts: object) -> np.ndarray:
        threads.extend(pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas")
        return np.full((2, 8), layer + 0.5)

    monkeypatch.setattr(router, "_rows", rows)
    monkeypatch.setattr(router, "gate_names", lambda shape: ["first", "second", "third"])
    shape: Any = SimpleNamespace(hidden=8)
    with threadpool_limits(4, user_api="blas"):
        gate = router.computed("fitted", shape, []).gate
        assert [gate(name)[0, 0] for name in ("third", "first", "second")] == [2.5, 0.5, 1.5]
    assert set(threads) == {1}


def test_few_processes_fit_layers_at_once_if_their_matrices_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router, "gate_names", lambda shape: ["first"])
    small, large = (router.computed("fitted", cast(Any, SimpleNamespace(hidden=h)), []) for h in (64, 8192))
    assert large.at_once == 1 < small.at_once
    assert large.bytes_of_gate > small.bytes_of_gate > 0


def test_the_key_of_a_router_changes_with_its_kind_and_with_what_the_sums_are_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(router, "gate_names", lambda shape: ["first"])
    shape: Any = SimpleNamespace(hidden=8)
    sums = [RouterSums(tmp_path / "same.safetensors", {"weights": weights, "text": "t"}) for weights in "ab"]
    keys = [router.computed(kind, shape, experts).key for kind in ("fitted", "hidden") for experts in (sums, sums[:1])]
    assert len({*keys, router.computed("fitted", shape, sums[::-1]).key}) == 5
    again = [RouterSums(tmp_path / "other.safetensors", dict(one.of)) for one in sums]
    assert router.computed("fitted", shape, again).key == keys[0]
