from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from btm_scale.config.evaluation import Tempering
from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.forest.posterior.log_weights import logsumexp
from btm_scale.forest.posterior.mixture import mixture_log_probs

MODES: list[dict[str, Any]] = [
    {"mode": "prefix"},
    {"mode": "token"},
    {"mode": "fixed"},
    {"mode": "tempered", "tempering": Tempering(power=0.3, forgetting=0.95)},
    {"mode": "tempered", "tempering": Tempering(power=0.3, forgetting=0.9, share=0.1)},
]


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_the_streaming_mixture_equals_that_of_the_complete_text(settings: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    log_probs = -random.exponential(3.0, size=(2, 3, 40))  # [texts, experts, tokens]
    log_probs[0, 1, 5] = log_probs[1, :, 20] = -np.inf
    prior = np.log([0.5, 0.2, 0.3])
    running = RunningPosterior(prior, 2, **settings)
    mixed = np.empty((2, 40))
    for token in range(40):
        weights = running.log_weights()
        assert logsumexp(weights.T) == pytest.approx(0, abs=1e-12)
        mixed[:, token] = logsumexp((weights + log_probs[:, :, token]).T)
        running.observe(log_probs[:, :, token])
    for text in range(2):
        complete = mixture_log_probs(log_probs[text], np.zeros(1, np.int64), log_prior=prior, **settings)
        assert mixed[text] == pytest.approx(complete, abs=1e-9)


def test_a_text_that_sees_no_token_keeps_its_weights() -> None:
    running = RunningPosterior(
        np.zeros(2), 2, mode="tempered", tempering=Tempering(power=0.3, forgetting=0.9, share=0.1)
    )
    running.observe(np.array([[-1.0, -3.0], [-1.0, -3.0]]), np.array([True, False]))
    assert running.log_weights()[1] == pytest.approx(np.log([0.5, 0.5]))
    assert running.log_weights()[0, 0] > np.log(0.5)


def test_an_expert_with_zero_prior_never_gets_weight_and_an_impossible_text_falls_back_to_the_prior() -> None:
    """Mixing in a share of the prior after every token gives no weight to an expert with prior 0."""
    with np.errstate(divide="ignore"):
        prior = np.log([[0.5, 0.0, 0.5], [0.0, 0.25, 0.75]])
    for settings in MODES:
        running = RunningPosterior(prior, 2, **settings)
        for log_probs in ([-3.0, -0.1, -2.0], [-1.0, -0.1, -0.5], [-np.inf] * 3):
            running.observe(np.array([log_probs, log_probs]))
            weights = np.exp(running.log_weights())
            assert weights.sum(axis=1) == pytest.approx(1)
            assert weights[0, 1] == weights[1, 0] == 0
        assert weights == pytest.approx(np.exp(prior))
