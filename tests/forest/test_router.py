"""Routers in closed form."""

from __future__ import annotations

import torch

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
