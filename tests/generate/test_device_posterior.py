from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from btm_scale.config.evaluation import Tempering
from btm_scale.forest.posterior.evidence import RunningPosterior
from btm_scale.generate.device_posterior import DevicePosterior
from btm_scale.generate.sampling import Sampling, from_mixture, token_log_probs

MODES: list[dict[str, Any]] = [
    {"mode": "prefix"},
    {"mode": "token"},
    {"mode": "fixed"},
    {"mode": "tempered", "tempering": Tempering(power=0.4, forgetting=0.9, share=0.05)},
    {"mode": "tempered", "tempering": Tempering(power=0.4, forgetting=0.9)},
]


@pytest.mark.parametrize("settings", MODES, ids=lambda settings: settings["mode"])
def test_the_posterior_on_the_device_equals_the_running_posterior(settings: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    prior = np.log([0.5, 0.3, 0.2, 1e-300])
    prior[3] = -np.inf
    running = RunningPosterior(prior, 3, **settings)
    running.observe(random.normal(-4, 2, (3, 4)))
    device = DevicePosterior(running, "cpu")
    more = RunningPosterior(prior[[1, 0, 2, 3]], 1, **settings)
    device.join(DevicePosterior(more, "cpu"))
    running.join(more)
    for step in range(40):
        if step == 20:
            device.keep([3, 0, 2])
            running.keep([3, 0, 2])
        weights = device.log_weights().log_softmax(1).numpy()
        np.testing.assert_allclose(np.exp(weights), np.exp(running.log_weights()), atol=1e-12)
        gains = random.normal(-4, 2, weights.shape)
        gains[:, 3] = 0.0  # what the kernel adds for an expert without weight
        running.observe(gains)
        device.observe(torch.from_numpy(gains))


def test_an_expert_that_a_token_excluded_gets_its_weight_back_in_mode_token() -> None:
    logits = torch.tensor([[[0.0, -np.inf]], [[0.0, 0.0]]])
    device = DevicePosterior(RunningPosterior(np.log([0.5, 0.5]), 1, mode="token"), "cpu")
    greedy = from_mixture(Sampling(temperature=0))
    for forced, expected in ((1, [0.0, 1.0]), (0, [2 / 3, 1 / 3])):
        only = torch.full((1, 1, 2), -np.inf)
        only[..., forced] = 0.0
        tokens, gains = greedy(logits + only, device.log_weights(), torch.Generator())
        assert tokens.tolist() == [forced]
        device.observe(token_log_probs(logits, tokens))
        assert device.log_weights().softmax(1)[0].tolist() == pytest.approx(expected)
        assert gains[0, 1] == 0  # of the logits with one token


@pytest.mark.parametrize("settings", MODES, ids=lambda settings: settings["mode"])
def test_texts_that_no_expert_allows_keep_the_prior(settings: dict[str, Any]) -> None:
    prior = np.log([0.75, 0.25, 1.0])
    prior[2] = -np.inf
    running = RunningPosterior(prior, 2, **settings)
    running.observe(np.array([[-np.inf, -np.inf, -1.0], [-1.0, -2.0, -1.0]]))
    device = DevicePosterior(running, "cpu")
    np.testing.assert_allclose(device.log_weights().softmax(1)[0], [0.75, 0.25, 0.0])
    np.testing.assert_allclose(device.log_weights().log_softmax(1), running.log_weights())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_posterior_drifts_by_less_than_a_hundredth_of_a_nat_in_2048_tokens(dtype: torch.dtype) -> None:
    experts, texts, vocabulary = 4, 2, 50
    random = torch.Generator().manual_seed(0)
    prior = np.log(np.full(experts, 1 / experts))
    device = DevicePosterior(RunningPosterior(prior, texts), "cpu")
    choose = from_mixture(Sampling())
    exact = torch.zeros(texts, experts, dtype=torch.float64)
    for _ in range(2048):
        # Experts so close to each other that every weight matters to the end.
        logits = 8 * torch.randn(1, texts, vocabulary, generator=random)
        logits = (logits + 0.05 * torch.randn(experts, texts, vocabulary, generator=random)).to(dtype)
        tokens, gains = choose(logits, device.log_weights(), random)
        device.observe(gains)
        exact += token_log_probs(logits, tokens)
    found = device.log_weights().log_softmax(1)
    assert (found - exact.log_softmax(1)).abs().max() < 0.01
    assert found.exp().max() < 1 - 1e-9
