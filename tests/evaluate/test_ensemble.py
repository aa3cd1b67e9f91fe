from __future__ import annotations

import numpy as np

from btm_scale.config.evaluation import EvaluateConfig, Tempering
from btm_scale.evaluate.ensemble import Fitted, FittedWeights, ensemble_methods, fitted_to
from btm_scale.forest.posterior.gate import Gate, fitted_gate, gated_mixture_log_probs
from btm_scale.forest.posterior.mixture import mixture_log_probs
from btm_scale.forest.posterior.prior import cached_prior, static_prior, updating_mixture_log_probs
from btm_scale.forest.posterior.tempering import fitted_tempering
from btm_scale.forest.scores import Stack

TEMPERING = Tempering(power=0.3, forgetting=0.9, share=0.01)
PRIOR = np.log([0.2, 0.5, 0.3])
STATIC, STATIC_TEMPERING = np.log([0.4, 0.4, 0.2]), Tempering(power=0.1, forgetting=0.95, share=0.03)
GATE = Gate(coefficients=(0.5, 0.2, 0.1, 0.0, 0.1, 0.0), share=0.01)
FITTED = FittedWeights(Fitted(PRIOR, TEMPERING), Fitted(STATIC, STATIC_TEMPERING), GATE)


def forest() -> Stack:
    return Stack(-np.random.default_rng(0).gamma(1.0, 2.0, (3, 60)), np.array([0, 20, 40]))


def methods(**settings: object) -> dict[str, np.ndarray]:
    return ensemble_methods(forest(), FITTED, EvaluateConfig.model_validate(settings))


def test_the_ensemble_follows_the_config_and_the_others_their_names() -> None:
    log_probs, starts = forest().log_probs, forest().block_starts
    prefix = mixture_log_probs(log_probs, starts, log_prior=PRIOR)
    tempered = mixture_log_probs(log_probs, starts, log_prior=PRIOR, mode="tempered", tempering=TEMPERING)
    plain = methods()
    np.testing.assert_array_equal(plain["ensemble"], prefix)
    np.testing.assert_array_equal(plain["ensemble:tempered"], tempered)
    np.testing.assert_array_equal(
        plain["ensemble:top2"], mixture_log_probs(log_probs, starts, log_prior=PRIOR, top_k=2)
    )
    assert "ensemble:top4" not in plain
    np.testing.assert_array_equal(methods(posterior="tempered")["ensemble"], tempered)
    np.testing.assert_array_equal(
        methods(prior="updating", posterior="tempered")["ensemble"],
        updating_mixture_log_probs(log_probs, starts, log_prior=PRIOR, mode="tempered", tempering=TEMPERING),
    )
    np.testing.assert_array_equal(methods(prior="uniform")["ensemble"], plain["ensemble:uniform-prior"])


def test_the_static_prior_has_its_own_tempering_and_leaves_the_other_methods_alone() -> None:
    log_probs, starts = forest().log_probs, forest().block_starts
    tempered = mixture_log_probs(log_probs, starts, log_prior=STATIC, mode="tempered", tempering=STATIC_TEMPERING)
    plain, static = methods(), methods(prior="static")
    np.testing.assert_array_equal(plain["ensemble:static"], tempered)
    np.testing.assert_array_equal(methods(prior="static", posterior="tempered")["ensemble"], tempered)
    np.testing.assert_array_equal(static["ensemble"], mixture_log_probs(log_probs, starts, log_prior=STATIC))
    for method in plain.keys() - {"ensemble"}:
        np.testing.assert_array_equal(static[method], plain[method])


def test_priors_and_temperings_are_fitted_to_dev_text_unless_the_config_has_a_tempering() -> None:
    dev = forest()
    fitted = fitted_to(dev, EvaluateConfig())
    np.testing.assert_array_equal(fitted.cached.log_prior, cached_prior(dev.log_probs, dev.block_starts))
    np.testing.assert_array_equal(fitted.static.log_prior, static_prior(dev.log_probs))
    assert fitted.gate == fitted_gate(dev.log_probs, dev.block_starts, fitted.static.log_prior)
    for one in (fitted.cached, fitted.static):
        assert one.tempering == fitted_tempering(dev.log_probs, dev.block_starts, one.log_prior)
    given = fitted_to(dev, EvaluateConfig(tempering=TEMPERING))
    assert [one.tempering for one in (given.cached, given.static)] == [TEMPERING, TEMPERING]


def test_the_gated_ensemble_starts_from_the_static_prior_whatever_the_config_says() -> None:
    log_probs, starts = forest().log_probs, forest().block_starts
    gated = gated_mixture_log_probs(log_probs, starts, GATE, log_prior=STATIC)
    for settings in ({}, {"posterior": "tempered", "prior": "uniform"}):
        np.testing.assert_array_equal(methods(**settings)["ensemble:gated"], gated)
    carried = gated_mixture_log_probs(log_probs, np.array([0]), GATE, log_prior=STATIC)
    np.testing.assert_array_equal(methods(blocks="carry")["ensemble:gated"], carried)


def test_blocks_can_carry_over_and_top_k_can_be_per_token() -> None:
    log_probs, starts = forest().log_probs, forest().block_starts
    carried = methods(blocks="carry", top_k_per_token=[1])
    np.testing.assert_array_equal(carried["ensemble"], mixture_log_probs(log_probs, np.array([0]), log_prior=PRIOR))
    assert not np.array_equal(carried["ensemble"], methods()["ensemble"])
    np.testing.assert_array_equal(
        methods(top_k_per_token=[1])["ensemble:top1-per-token"],
        mixture_log_probs(log_probs, starts, log_prior=PRIOR, top_k_per_token=1),
    )
