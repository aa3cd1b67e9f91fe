from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from btm_scale.forest.posterior.evidence import Tempering, logsumexp
from btm_scale.forest.posterior.mixture import mixture_log_probs
from btm_scale.forest.posterior.streaming import RunningPosterior
from btm_scale.generate.detokenizer import Transcript

MODES: list[dict[str, Any]] = [
    {"mode": "prefix"},
    {"mode": "token"},
    {"mode": "fixed"},
    {"mode": "tempered", "tempering": Tempering(0.3, 0.95)},
    {"mode": "tempered", "tempering": Tempering(0.3, 0.9, 0.1)},
]


@pytest.mark.parametrize("settings", MODES, ids=str)
def test_step_by_step_the_mixture_is_that_of_the_whole_text(settings: dict[str, Any]) -> None:
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
        whole = mixture_log_probs(log_probs[text], np.zeros(1, np.int64), log_prior=prior, **settings)
        assert mixed[text] == pytest.approx(whole, abs=1e-9)


def test_a_text_that_sees_no_token_keeps_its_weights() -> None:
    running = RunningPosterior(np.zeros(2), 2, mode="tempered", tempering=Tempering(0.3, 0.9, 0.1))
    running.observe(np.array([[-1.0, -3.0], [-1.0, -3.0]]), np.array([True, False]))
    assert running.log_weights()[1] == pytest.approx(np.log([0.5, 0.5]))
    assert running.log_weights()[0, 0] > np.log(0.5)


def _utf8(ids: list[int]) -> str:
    return bytes(ids).decode(errors="replace")


def test_a_character_of_several_tokens_is_told_when_it_is_whole() -> None:
    transcript = Transcript(_utf8, b"caf")
    pieces = [transcript.add(byte) for byte in "é = ☕!".encode()]
    assert "".join(pieces) == "é = ☕!"
    assert pieces[:2] == ["", "é"]
    assert "\ufffd" not in "".join(pieces)
    cut_off = Transcript(_utf8, b"caf")
    assert cut_off.add("é".encode()[0]) + cut_off.finish() == "\ufffd"


def test_nothing_of_a_stop_string_is_told_though_it_comes_in_parts() -> None:
    transcript = Transcript(_utf8, b"Q", stop=["\n\n", "Q:"])
    told = [transcript.add(byte) for byte in b"one\ntwo\n\nthree"]
    assert "".join(told) == transcript.text == "one\ntwo"
    assert transcript.stopped
    open_end = Transcript(_utf8, b"Q", stop=["Q:"])
    assert "".join([open_end.add(byte) for byte in b"one Q"]) == "one "
    assert open_end.finish() == "Q"
