from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btm_scale.forest.posterior import cached_prior, mixture_log_probs, updating_mixture_log_probs


def by_the_formula(log_probs: np.ndarray, starts: list[int], prior: np.ndarray) -> np.ndarray:
    """p(x_t|x_<t) = p(x_<=t) / p(x_<t), with p(x) = sum_j prior_j prod p_j(x): the mixture of whole prefixes."""
    result = []
    for begin, end in zip(starts, [*starts[1:], log_probs.shape[1]], strict=True):
        joint = np.zeros(end - begin + 1)
        for t in range(end - begin + 1):
            joint[t] = np.log(
                sum(prior[j] * np.exp(log_probs[j, begin : begin + t].sum()) for j in range(len(prior)))
            )
        result.append(np.diff(joint))
    return np.concatenate(result)


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 6),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    spread=st.floats(0.1, 8),
)
def test_the_prefix_mixture_is_the_ratio_of_prefix_probabilities(
    experts: int, tokens: int, seed: int, spread: float
) -> None:
    random = np.random.default_rng(seed)
    log_probs = -random.gamma(1.0, spread, (experts, tokens))
    prior = random.dirichlet(np.ones(experts))
    starts = sorted({0, *random.integers(0, tokens, 2).tolist()})
    found = mixture_log_probs(log_probs, np.array(starts), log_prior=np.log(prior))
    np.testing.assert_allclose(found, by_the_formula(log_probs, starts, prior), atol=1e-9)


def test_one_expert_is_its_own_ensemble() -> None:
    log_probs = -np.random.default_rng(0).random((1, 30))
    for mode in ("prefix", "token", "fixed"):
        np.testing.assert_allclose(mixture_log_probs(log_probs, np.array([0, 7]), mode=mode), log_probs[0])


def test_token_weights_follow_one_previous_token_only() -> None:
    log_probs = np.log(np.array([[0.9, 0.2, 0.5], [0.1, 0.4, 0.3]]))
    found = np.exp(mixture_log_probs(log_probs, np.array([0]), mode="token"))
    expected = [0.5, 0.9 * 0.2 + 0.1 * 0.4, (0.2 * 0.5 + 0.4 * 0.3) / 0.6]
    np.testing.assert_allclose(found, expected)


def test_equal_weights_never_move() -> None:
    log_probs = np.log(np.array([[0.9, 0.2], [0.1, 0.4]]))
    np.testing.assert_allclose(np.exp(mixture_log_probs(log_probs, np.array([0]), mode="fixed")), [0.5, 0.3])


def test_top_k_takes_the_likeliest_of_the_prior_and_no_fewer_than_there_are() -> None:
    random = np.random.default_rng(1)
    log_probs, prior = -random.random((4, 20)), np.log([0.1, 0.4, 0.2, 0.3])
    top2 = mixture_log_probs(log_probs, np.array([0]), log_prior=prior, top_k=2)
    np.testing.assert_allclose(
        top2, mixture_log_probs(log_probs[[1, 3]], np.array([0]), log_prior=prior[[1, 3]])
    )
    everyone = mixture_log_probs(log_probs, np.array([0]), log_prior=prior, top_k=9)
    np.testing.assert_allclose(everyone, mixture_log_probs(log_probs, np.array([0]), log_prior=prior))


def test_an_expert_that_rules_a_token_out_loses_its_weight_for_the_block() -> None:
    log_probs = np.log(np.array([[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]]))
    log_probs[0, 1] = -np.inf
    found = np.exp(mixture_log_probs(log_probs, np.array([0, 3])))
    np.testing.assert_allclose(found, [0.375, 0.25 / 3, 0.25, 0.375])


def test_where_every_expert_rules_a_token_out_its_probability_is_zero_and_nothing_is_nan() -> None:
    log_probs = np.array([[-1.0, -np.inf, -1.0], [-1.0, -np.inf, -2.0]])
    found = mixture_log_probs(log_probs, np.array([0]))
    assert found[1] == -np.inf
    assert not np.isnan(found).any()


@pytest.mark.parametrize("bad", [0.1, np.nan])
def test_what_is_no_log_probability_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="score the experts again"):
        mixture_log_probs(np.array([[-1.0, bad]]), np.array([0]))


def test_a_prior_that_weighs_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="prior"):
        mixture_log_probs(-np.ones((2, 3)), np.array([0]), log_prior=np.array([-np.inf, -np.inf]))


def test_the_cached_prior_is_a_moving_average_of_block_posteriors() -> None:
    log_probs = np.log(np.array([[0.8, 0.8, 0.5], [0.2, 0.2, 0.5]]))
    prior = np.array([0.5, 0.5])
    for block in ([0.64, 0.04], [0.5, 0.5]):
        posterior = prior * block / (prior * block).sum()
        prior = 0.7 * prior + 0.3 * posterior
    np.testing.assert_allclose(np.exp(cached_prior(log_probs, np.array([0, 2]))), prior)


def test_an_updating_prior_learns_from_earlier_blocks() -> None:
    log_probs = np.log(np.array([[0.8] * 8, [0.2] * 8]))
    starts = np.array([0, 4])
    frozen = mixture_log_probs(log_probs, starts)
    updating = updating_mixture_log_probs(log_probs, starts, log_prior=np.log([0.5, 0.5]))
    np.testing.assert_allclose(updating[:4], frozen[:4])
    assert updating[4] > frozen[4]


def test_log_odds_stay_exact_over_a_long_block() -> None:
    random = np.random.default_rng(2)
    log_probs = (-30.0 * random.random((2, 100_000))).astype(np.float32)
    found = mixture_log_probs(log_probs, np.array([0]))
    exact = log_probs.astype(np.longdouble)
    joint = np.logaddexp(*np.concatenate([np.zeros((2, 1)), np.cumsum(exact, axis=1)], axis=1)) - np.log(2.0)
    np.testing.assert_allclose(found, np.diff(joint).astype(float), atol=1e-6)
