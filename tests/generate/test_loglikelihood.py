from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_forest import POSITIONS, Letters, Oracle, write_experts

from btm_scale.config.evaluation import Tempering
from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError, UserError
from btm_scale.evaluate.ensemble import fitted_to
from btm_scale.forest.scores import Stack
from btm_scale.generate import loglikelihood
from btm_scale.generate.generator import Generator
from btm_scale.generate.loglikelihood import generator_of_method, score_continuations, score_windows
from btm_scale.model.hf_decoder import Decoder
from btm_scale.run_dir import RunDir

PRIOR = np.log([0.8, 0.2])
MODES: list[dict[str, Any]] = [
    {"posterior": "prefix"},
    {"posterior": "tempered", "tempering": Tempering(power=0.4, forgetting=0.9, share=0.05)},
]


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_experts(tmp_path_factory.mktemp("experts"))


@pytest.mark.parametrize("at_once", [None, 1, 2])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode["posterior"])
def test_continuations_and_windows_have_the_mixtures_log_probability(
    mode: dict[str, Any], at_once: int | None, experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if at_once is not None:  # tokens of each continuation
        monkeypatch.setattr(loglikelihood, "_MAX_LOGITS", at_once * 4 * len(experts) * Letters.vocab_size)
    oracle = Oracle(experts)
    settings = {"log_prior": PRIOR, "mode": mode["posterior"], "tempering": mode.get("tempering")}
    pairs = [([0, 1, 2], [3, 4]), ([0], [1]), ([0, 4, 4, 4, 1, 1], [2, 2, 3])]
    # The greedy continuation of the mixture.
    best: list[int] = []
    for _ in range(3):
        best.append(int(np.argmax(oracle.mixture_after([0, 3, *best], **settings))))
    pairs.append(([0, 3], best))
    generator = Generator(experts, Letters(), log_prior=PRIOR, method="mixture", **mode)
    scores = score_continuations(generator, pairs)
    windows = score_windows(generator, [([*context, *text], len(text)) for context, text in pairs])
    for (context, text), (nats, is_greedy), window in zip(pairs, scores, windows, strict=True):
        steps = [oracle.mixture_after([*context, *text[:place]], **settings) for place in range(len(text))]
        expected = sum(step[token] for step, token in zip(steps, text, strict=True))
        assert nats == pytest.approx(expected, abs=1e-4)
        assert window == pytest.approx(expected, abs=1e-4)
        assert is_greedy == all(np.argmax(step) == token for step, token in zip(steps, text, strict=True))
    assert scores[-1][1]


def test_stacked_experts_score_continuations_in_two_forward_passes_and_windows_in_one(
    experts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = Generator(experts, Letters(), log_prior=PRIOR, method="mixture")
    passes: list[tuple[int, ...]] = []
    logits = Decoder.logits

    def spy(self: Decoder, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
        passes.append(tuple(ids.shape))
        return logits(self, ids, **settings)

    monkeypatch.setattr(Decoder, "logits", spy)
    score_continuations(generator, [([0, 1, 2], [3, 4, 1, 2]), ([0], [1])])
    assert passes == [(2 * len(experts), 3), (2 * len(experts), 3)]
    passes.clear()
    score_windows(generator, [([0, 1, 2, 3], 2), ([0, 1], 1)])
    assert passes == [(2 * len(experts), 4)]


def test_a_long_context_is_truncated_from_the_left_and_a_long_continuation_is_rejected(
    experts: dict[str, Path],
) -> None:
    generator = Generator(experts, Letters(), method="mixture")
    context = [0, *([1, 2, 3, 4] * 10)]
    assert score_continuations(generator, [(context, [1, 2])]) == score_continuations(
        generator, [(context[-(POSITIONS - 1) :], [1, 2])]
    )
    with pytest.raises(UserError, match="leaves no room"):
        score_continuations(generator, [([0], [1] * (POSITIONS + 1))])


def test_log_likelihoods_of_a_diverged_expert_are_refused(experts: dict[str, Path]) -> None:
    generator = Generator(experts, Letters(), method="mixture")
    with torch.inference_mode():
        generator.shelf.take("expert1").model.get_output_embeddings().weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="Check for a diverged expert"):
        score_continuations(generator, [([0], [1, 2])])
    with pytest.raises(FloatingPointError, match="Check for a diverged expert"):
        score_windows(generator, [([0, 1, 2], 2)])


def test_methods_have_their_names_in_results_json(handmade: tuple[RunConfig, RunDir]) -> None:
    config, run = handmade
    assert generator_of_method(config, run, "expert:python").names == ["python"]
    assert generator_of_method(config, run, "seed").names == ["seed"]
    pooled = generator_of_method(config, run, "ensemble")
    assert pooled.names == ["cpp", "docs", "licences", "python"]
    own = generator_of_method(config, run, "ensemble:token", domain="python")
    assert own.mode == "token"
    assert own.log_prior[3] > pooled.log_prior[3]
    assert generator_of_method(config, run, "ensemble:tempered").tempering is not None
    static = generator_of_method(config, run, "ensemble:static", domain="python")
    assert static.log_prior[3] > static.log_prior[:3].max()
    assert not np.allclose(static.log_prior, own.log_prior)
    assert static.tempering is not None
    equal = generator_of_method(config, run, "ensemble:equal")
    assert np.exp(equal.log_prior) == pytest.approx(0.25)
    assert generator_of_method(config, run, "average:argmax", domain="python").names == ["python"]
    with pytest.raises(UserError, match="law"):
        generator_of_method(config, run, "average:argmax", domain="law")
    with pytest.raises(UserError, match=r"Unknown method 'blend'\. Choose one of ensemble, "):
        generator_of_method(config, run, "blend")
    with pytest.raises(UserError, match="'average:posterior' is a different model for each domain"):
        generator_of_method(config, run, "average:posterior")
    with pytest.raises(UserError, match="'ensemble:gated' is only evaluated"):
        generator_of_method(config, run, "ensemble:gated")
    with pytest.raises(ForestError, match=r"Unknown model '.*'\."):
        generator_of_method(config, run, "expert:law")


def test_an_ensemble_with_a_uniform_prior_is_that_of_results_json_in_every_domain(
    handmade: tuple[RunConfig, RunDir],
) -> None:
    config, run = handmade
    settings = config.evaluate.model_copy(update={"prior": "uniform", "posterior": "tempered"})
    config = config.model_copy(update={"evaluate": settings})
    names = generator_of_method(config, run, "ensemble").names
    for domain in ("python", "docs"):
        fitted = fitted_to(Stack.load(run, names, domain, "dev"), settings)
        for method, tempering in (("ensemble", fitted.cached.tempering), ("ensemble:uniform-prior", None)):
            generator = generator_of_method(config, run, method, domain=domain)
            assert np.exp(generator.log_prior) == pytest.approx(0.25)
            assert generator.tempering == tempering
    with pytest.raises(UserError, match="Unknown domain 'law'"):
        generator_of_method(config, run, "ensemble", domain="law")
