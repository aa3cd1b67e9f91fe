from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from btm_scale.config.evaluation import Tempering
from btm_scale.forest.posterior import mixture
from btm_scale.forest.posterior.evidence import Mode
from btm_scale.forest.posterior.mixture import mean_tempered_weights, mixture_log_probs, tempered_mixtures
from btm_scale.forest.posterior.prior import cached_prior, updating_mixture_log_probs
from btm_scale.forest.posterior.tempering import fitted_tempering


def tempered(power: float, forgetting: float = 1.0, share: float = 0.0) -> Tempering:
    return Tempering(power=power, forgetting=forgetting, share=share)


def by_the_formula(log_probs: np.ndarray, starts: list[int], prior: np.ndarray) -> np.ndarray:
    """p(x_t|x_<t) = p(x_<=t) / p(x_<t), with p(x) = sum_j prior_j prod p_j(x): the mixture of complete prefixes."""
    result = []
    for begin, end in zip(starts, [*starts[1:], log_probs.shape[1]], strict=True):
        joint = np.zeros(end - begin + 1)
        for t in range(end - begin + 1):
            joint[t] = np.log(sum(prior[j] * np.exp(log_probs[j, begin : begin + t].sum()) for j in range(len(prior))))
        result.append(np.diff(joint))
    return np.concatenate(result)


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
    mixed = mixture_log_probs(log_probs, np.array(starts), log_prior=np.log(prior))
    np.testing.assert_allclose(mixed, by_the_formula(log_probs, starts, prior), atol=1e-9)


def test_one_expert_is_its_own_ensemble() -> None:
    log_probs = -np.random.default_rng(0).random((1, 30))
    for mode in ("prefix", "token", "fixed"):
        np.testing.assert_allclose(mixture_log_probs(log_probs, np.array([0, 7]), mode=mode), log_probs[0])


def test_token_weights_follow_one_previous_token_only() -> None:
    log_probs = np.log(np.array([[0.9, 0.2, 0.5], [0.1, 0.4, 0.3]]))
    mixed = np.exp(mixture_log_probs(log_probs, np.array([0]), mode="token"))
    expected = [0.5, 0.9 * 0.2 + 0.1 * 0.4, (0.2 * 0.5 + 0.4 * 0.3) / 0.6]
    np.testing.assert_allclose(mixed, expected)


def test_equal_weights_never_change() -> None:
    log_probs = np.log(np.array([[0.9, 0.2], [0.1, 0.4]]))
    np.testing.assert_allclose(np.exp(mixture_log_probs(log_probs, np.array([0]), mode="fixed")), [0.5, 0.3])


def test_top_k_keeps_the_experts_with_the_largest_prior_and_all_if_there_are_fewer() -> None:
    random = np.random.default_rng(1)
    log_probs, prior = -random.random((4, 20)), np.log([0.1, 0.4, 0.2, 0.3])
    top2 = mixture_log_probs(log_probs, np.array([0]), log_prior=prior, top_k=2)
    np.testing.assert_allclose(top2, mixture_log_probs(log_probs[[1, 3]], np.array([0]), log_prior=prior[[1, 3]]))
    all_experts = mixture_log_probs(log_probs, np.array([0]), log_prior=prior, top_k=9)
    np.testing.assert_allclose(all_experts, mixture_log_probs(log_probs, np.array([0]), log_prior=prior))


def test_an_expert_that_gives_a_token_zero_probability_loses_its_weight_for_the_block() -> None:
    log_probs = np.log(np.array([[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25]]))
    log_probs[0, 1] = -np.inf
    mixed = np.exp(mixture_log_probs(log_probs, np.array([0, 3])))
    np.testing.assert_allclose(mixed, [0.375, 0.25 / 3, 0.25, 0.375])


def test_a_token_that_no_expert_allows_has_probability_zero_and_nothing_is_nan() -> None:
    log_probs = np.array([[-1.0, -np.inf, -1.0], [-1.0, -np.inf, -2.0]])
    mixed = mixture_log_probs(log_probs, np.array([0]))
    assert mixed[1] == -np.inf
    assert not np.isnan(mixed).any()


@pytest.mark.parametrize("bad", [0.1, np.nan])
def test_invalid_log_probabilities_are_rejected(bad: float) -> None:
    with pytest.raises(ValueError, match="Score the experts again"):
        mixture_log_probs(np.array([[-1.0, bad]]), np.array([0]))


def test_a_prior_without_weight_is_rejected() -> None:
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
    mixed = mixture_log_probs(log_probs, np.array([0]))
    exact = log_probs.astype(np.longdouble)
    joint = np.logaddexp(*np.concatenate([np.zeros((2, 1)), np.cumsum(exact, axis=1)], axis=1)) - np.log(2.0)
    np.testing.assert_allclose(mixed, np.diff(joint).astype(float), atol=1e-6)


def tempered_token_by_token(
    log_probs: np.ndarray, starts: list[int], prior: np.ndarray, tempering: Tempering
) -> tuple[np.ndarray, np.ndarray]:
    """Tempering by definition, token by token, in probabilities: the mixture, and the weights [tokens, experts]."""
    result, before = [], []
    for token in range(log_probs.shape[1]):
        if token in starts:
            weights = prior
        probabilities = np.exp(log_probs[:, token])
        before.append(weights)
        result.append(np.log(weights @ probabilities))
        weights = weights**tempering.forgetting * probabilities**tempering.power
        weights = (1 - tempering.share) * weights / weights.sum() + tempering.share * prior
    return np.array(result), np.array(before)


@given(
    experts=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    power=st.floats(0.01, 1.5),
    forgetting=st.floats(0.1, 1.0),
    share=st.sampled_from([0.0, 0.01, 0.5]),
)
def test_tempering_matches_its_definition(
    experts: int, seed: int, power: float, forgetting: float, share: float
) -> None:
    random = np.random.default_rng(seed)
    log_probs = -random.gamma(1.0, 2.0, (experts, 40))
    prior = random.dirichlet(np.ones(experts))
    tempering, starts = tempered(power, forgetting, share), [0, 10, 20, 33]
    mixed = mixture_log_probs(
        log_probs, np.array(starts), log_prior=np.log(prior), mode="tempered", tempering=tempering
    )
    expected, weights = tempered_token_by_token(log_probs, starts, prior, tempering)
    np.testing.assert_allclose(mixed, expected, atol=1e-9)
    mean = mean_tempered_weights(log_probs, np.array(starts), tempering, log_prior=np.log(prior))
    np.testing.assert_allclose(mean, weights.mean(axis=0), atol=1e-9)


def test_an_expert_with_zero_prior_has_no_tempered_weight() -> None:
    log_probs = -np.random.default_rng(5).gamma(1.0, 2.0, (3, 20))
    with np.errstate(divide="ignore"):
        prior = np.log(np.array([0.7, 0.0, 0.3]))
    mean = mean_tempered_weights(log_probs, np.array([0, 12]), tempered(0.2, 0.9, 0.1), log_prior=prior)
    assert mean[1] == 0
    two = mean_tempered_weights(log_probs[[0, 2]], np.array([0, 12]), tempered(0.2, 0.9, 0.1), log_prior=prior[[0, 2]])
    np.testing.assert_allclose(mean[[0, 2]], two)


def test_temperings_computed_together_equal_each_alone() -> None:
    random = np.random.default_rng(4)
    log_probs = -random.gamma(1.0, 2.0, (4, 70))
    log_probs[1, 25], log_probs[:, 40] = -np.inf, -np.inf
    starts, prior = np.array([0, 20, 40, 60]), np.log(random.dirichlet(np.ones(4)))
    temperings = [
        tempered(0.2, 0.9, 0.0),
        tempered(1.0, 1.0, 0.1),
        tempered(1.0),
        tempered(0.5, 0.8, 0.003),
    ]
    together = tempered_mixtures(log_probs, starts, temperings, log_prior=prior)
    for mixed, tempering in zip(together, temperings, strict=True):
        alone = mixture_log_probs(log_probs, starts, log_prior=prior, mode="tempered", tempering=tempering)
        np.testing.assert_allclose(mixed, alone, rtol=1e-12)


def test_tempering_with_full_power_and_memory_is_the_prefix_posterior() -> None:
    log_probs = -np.random.default_rng(1).gamma(1.0, 2.0, (4, 60))
    starts = np.array([0, 30])
    prefix = mixture_log_probs(log_probs, starts)
    np.testing.assert_allclose(
        mixture_log_probs(log_probs, starts, mode="tempered", tempering=tempered(1.0)), prefix, atol=1e-9
    )


@pytest.mark.parametrize("mode", ["prefix", "token", "tempered", "fixed"])
def test_processing_in_small_pieces_gives_the_same_result(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs = -np.random.default_rng(2).gamma(1.0, 2.0, (3, 100))
    log_probs[1, 40] = -np.inf
    starts = np.array([0, 20, 40, 60, 93])
    tempering = tempered(0.3, 0.9, 0.01) if mode == "tempered" else None
    at_once = mixture_log_probs(log_probs, starts, mode=mode, tempering=tempering)
    monkeypatch.setattr(mixture, "_AT_ONCE", 21)
    pieces = mixture_log_probs(log_probs, starts, mode=mode, tempering=tempering)
    np.testing.assert_allclose(pieces, at_once, atol=1e-12)


def test_the_share_of_the_prior_restores_an_expert_with_zero_weight() -> None:
    log_probs = np.log(np.array([[0.5, 0.5, 0.5], [0.9, 0.9, 0.9]]))
    log_probs[1, 0] = -np.inf
    with_share = mixture_log_probs(log_probs, np.array([0]), mode="tempered", tempering=tempered(1.0, 1.0, 0.1))
    np.testing.assert_allclose(np.exp(with_share[:2]), [0.25, 0.95 * 0.5 + 0.05 * 0.9])


def test_a_tiny_share_of_the_prior_does_not_underflow() -> None:
    log_probs = np.log(np.array([[0.5, 1e-300, 1e-300, 1e-300], [0.5, 0.9, 0.9, 0.9]]))
    with np.errstate(divide="raise"):
        mixed = mixture_log_probs(
            log_probs,
            np.array([0]),
            log_prior=np.array([0.0, -800.0]),
            mode="tempered",
            tempering=tempered(1.0, 1.0, 0.1),
        )
    assert mixed[3] > np.log(0.5), "an expert that is far better must gain weight in the end"


def test_top_k_per_token_keeps_the_largest_weights_before_each_token() -> None:
    log_probs = np.log(np.array([[0.9, 0.2, 0.3], [0.1, 0.4, 0.6], [0.3, 0.5, 0.1]]))
    mixed = np.exp(mixture_log_probs(log_probs, np.array([0]), top_k_per_token=1))
    # Weights before each token: equal (the first is kept), then 0.9 : 0.1 : 0.3, then 0.18 : 0.04 : 0.15.
    np.testing.assert_allclose(mixed, [0.9, 0.2, 0.3])


@pytest.mark.parametrize("numbers", [(0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (1.0, 1.1, 0.0), (1.0, 1.0, 1.0)])
def test_an_invalid_tempering_is_rejected(numbers: tuple[float, float, float]) -> None:
    power, forgetting, share = numbers
    with pytest.raises(ValueError, match=r"should be (greater|less) than"):
        tempered(power, forgetting, share)


def test_only_tokens_that_count_decide_tempering_and_mean_weights() -> None:
    """The other tokens are evidence all the same."""
    random = np.random.default_rng(6)
    log_probs = -random.gamma(1.0, 1.0, (2, 600)) - 0.5
    counted = np.arange(600) % 20 >= 10
    better = np.where(counted, 0, random.integers(0, 2, 600))  # the first expert answers better
    log_probs[better, np.arange(600)] *= 0.3
    starts, prior = np.arange(0, 600, 100), np.log([0.5, 0.5])
    every, answers = (fitted_tempering(log_probs, starts, prior, which) for which in (None, counted))
    all_counted = np.ones(600, bool)
    assert fitted_tempering(log_probs, starts, prior, all_counted) == every

    def likelihood(tempering: Tempering) -> float:
        return float(mixture_log_probs(log_probs, starts, mode="tempered", tempering=tempering)[counted].mean())

    assert likelihood(answers) > likelihood(every)
    setting = tempered(0.2, 0.9, 0.1)
    _, weights = tempered_token_by_token(log_probs, starts.tolist(), np.exp(prior), setting)
    mean = mean_tempered_weights(log_probs, starts, setting, log_prior=prior, counted=counted)
    np.testing.assert_allclose(mean, weights[counted].mean(axis=0), atol=1e-9)
    assert abs(mean - weights.mean(axis=0)).max() > 0.01


def test_fitted_tempering_beats_the_prefix_posterior_if_experts_alternate() -> None:
    random = np.random.default_rng(3)
    log_probs = -random.gamma(1.0, 1.0, (2, 2000)) - 0.5
    better = np.repeat(random.integers(0, 2, 100), 20)
    log_probs[better, np.arange(2000)] *= 0.3
    starts = np.arange(0, 2000, 200)
    prior = np.log([0.5, 0.5])
    tempering = fitted_tempering(log_probs, starts, prior)
    fitted = mixture_log_probs(log_probs, starts, mode="tempered", tempering=tempering)
    assert tempering.forgetting < 1
    assert fitted.mean() > mixture_log_probs(log_probs, starts).mean() + 0.1
