"""The static prior: the fixed mixture of experts that gives dev text the highest likelihood."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btm_scale.forest.posterior.mixture import mixture_log_probs
from btm_scale.forest.posterior.prior import static_prior

START = np.zeros(1, np.int64)


def likelihood(log_probs: np.ndarray, prior: np.ndarray) -> float:
    return float(mixture_log_probs(log_probs, START, log_prior=prior, mode="fixed").mean())


@settings(max_examples=20)
@given(random_seed=st.integers(0, 2**32 - 1), experts=st.integers(1, 6))
def test_no_other_fixed_weights_are_more_likely(random_seed: int, experts: int) -> None:
    random = np.random.default_rng(random_seed)
    log_probs = -random.gamma(1.0, 2.0, (experts, 4000))
    prior = static_prior(log_probs)
    assert np.exp(prior).sum() == pytest.approx(1.0)
    best = likelihood(log_probs, prior)
    near = [np.exp(prior) * random.uniform(0.7, 1.4, experts) for _ in range(10)]
    for weights in [*near, *random.dirichlet(np.ones(experts), 10)]:
        assert likelihood(log_probs, np.log(weights)) <= best + 1e-4


def test_the_weights_of_a_mixture_are_recovered_from_its_text() -> None:
    random = np.random.default_rng(0)
    experts, weights = random.dirichlet(np.full(50, 0.3), 3), np.array([0.6, 0.3, 0.1])
    text = random.choice(50, 20_000, p=weights @ experts)
    prior = static_prior(np.log(np.maximum(experts, 1e-30))[:, text])
    np.testing.assert_allclose(np.exp(prior), weights, atol=0.02)


def test_experts_in_another_order_have_the_same_weights() -> None:
    log_probs = -np.random.default_rng(1).gamma(1.0, 2.0, (4, 500))
    order = [2, 0, 3, 1]
    np.testing.assert_allclose(static_prior(log_probs[order]), static_prior(log_probs)[order], atol=1e-9)


def test_no_expert_has_weight_zero_and_tokens_that_none_allows_do_not_count() -> None:
    log_probs = np.log(np.array([[0.9, 0.9, 0.9, 0.9], [1e-9, 1e-9, 1e-9, 1e-9]]))
    prior = static_prior(log_probs)
    assert -3.0 < prior[1] < prior[0] < 0
    impossible = np.concatenate([log_probs, np.full((2, 3), -np.inf)], axis=1)
    np.testing.assert_allclose(static_prior(impossible), prior)


def test_of_conversations_only_answers_count() -> None:
    log_probs = -np.random.default_rng(2).gamma(1.0, 2.0, (3, 300))
    counted = np.arange(300) % 3 == 0
    np.testing.assert_array_equal(static_prior(log_probs, counted), static_prior(log_probs[:, counted]))
