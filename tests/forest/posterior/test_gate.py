"""The gate: weights from decaying evidence, with coefficients of the highest likelihood of dev text."""

from __future__ import annotations

import numpy as np
import pytest

from btm_scale.config.evaluation import Tempering
from btm_scale.forest.posterior import gate as gate_module
from btm_scale.forest.posterior.gate import FORGETTINGS, Gate, fitted_gate, gated_mixture_log_probs
from btm_scale.forest.posterior.mixture import mixture_log_probs
from btm_scale.forest.posterior.prior import static_prior

PRIOR = np.log([0.5, 0.3, 0.2])


def text(blocks: int, seed: int, length: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Return experts' log-probabilities and block starts; each block is one expert's domain."""
    random = np.random.default_rng(seed)
    log_probs = -random.gamma(1.0, 2.0, blocks * length) * random.uniform(0.8, 1.2, (3, blocks * length)) - 0.05
    for block, expert in enumerate(random.choice(3, blocks, p=[0.6, 0.3, 0.1])):
        log_probs[expert, block * length : (block + 1) * length] *= 0.8
    return log_probs, np.arange(blocks) * length


def by_the_formula(log_probs: np.ndarray, starts: list[int], gate: Gate, log_prior: np.ndarray) -> np.ndarray:
    result = []
    for begin, end in zip(starts, [*starts[1:], log_probs.shape[1]], strict=True):
        for t in range(begin, end):
            score = gate.coefficients[0] * log_prior
            for factor, forgetting in zip(gate.coefficients[1:], FORGETTINGS, strict=True):
                score = score + factor * sum(log_probs[:, s] * forgetting ** (t - s - 1) for s in range(begin, t))
            weights = np.exp(score - score.max())
            weights = (1 - gate.share) * weights / weights.sum() + gate.share * np.exp(log_prior)
            result.append(np.log(weights @ np.exp(log_probs[:, t])))
    return np.array(result)


@pytest.mark.parametrize("at_once", [2**19, 50])
def test_the_weights_are_those_of_the_formula_however_many_blocks_are_processed_at_once(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "_AT_ONCE", at_once)
    log_probs, _ = text(3, 0, length=10)
    starts = [0, 12, 20]  # blocks of different lengths
    gate = Gate(coefficients=(0.7, 0.3, 0.2, -0.1, 0.05, 0.02), share=0.1)
    mixed = gated_mixture_log_probs(log_probs, np.array(starts), gate, log_prior=PRIOR)
    np.testing.assert_allclose(mixed, by_the_formula(log_probs, starts, gate, PRIOR), atol=1e-9)


def test_special_gates_are_the_prefix_and_the_tempered_posterior() -> None:
    log_probs, starts = text(4, 1)
    prefix = Gate(coefficients=(1.0, 0.0, 0.0, 0.0, 0.0, 1.0), share=0.0)
    np.testing.assert_allclose(
        gated_mixture_log_probs(log_probs, starts, prefix, log_prior=PRIOR),
        mixture_log_probs(log_probs, starts, log_prior=PRIOR),
    )
    tempered = Gate(coefficients=(0.0, 0.0, 0.0, 0.0, 0.2, 0.0), share=0.0)
    np.testing.assert_allclose(
        gated_mixture_log_probs(log_probs, starts, tempered, log_prior=PRIOR),
        mixture_log_probs(log_probs, starts, mode="tempered", tempering=Tempering(power=0.2, forgetting=0.97)),
    )


def test_the_fitted_gate_predicts_dev_text_better_than_the_prior_and_than_where_it_starts() -> None:
    log_probs, starts = text(40, 2)
    prior = static_prior(log_probs)
    gate = fitted_gate(log_probs, starts, prior)
    fitted = gated_mixture_log_probs(log_probs, starts, gate, log_prior=prior).mean()
    start = Gate(coefficients=gate_module._START, share=0.0)
    assert fitted > gated_mixture_log_probs(log_probs, starts, start, log_prior=prior).mean()
    assert fitted > mixture_log_probs(log_probs, starts, log_prior=prior, mode="fixed").mean()
    for i in range(6):
        for change in (-0.02, 0.02):
            other = list(gate.coefficients)
            other[i] += change
            near = Gate(coefficients=tuple(other), share=gate.share)
            assert gated_mixture_log_probs(log_probs, starts, near, log_prior=prior).mean() <= fitted + 1e-5


def test_the_order_of_the_experts_changes_no_coefficient() -> None:
    log_probs, starts = text(20, 3)
    order = [2, 0, 1]
    gates = [fitted_gate(log_probs[rows], starts, PRIOR[rows]) for rows in ([0, 1, 2], order)]
    np.testing.assert_allclose(gates[0].coefficients, gates[1].coefficients, atol=1e-4)


def test_one_expert_and_impossible_tokens_give_no_nan() -> None:
    log_probs, starts = text(6, 4)
    alone = log_probs[:1]
    gate = fitted_gate(alone, starts, np.zeros(1))
    np.testing.assert_allclose(gated_mixture_log_probs(alone, starts, gate, log_prior=np.zeros(1)), alone[0])
    log_probs[0, 5] = -np.inf
    log_probs[:, 70] = -np.inf
    mixed = gated_mixture_log_probs(log_probs, starts, fitted_gate(log_probs, starts, PRIOR), log_prior=PRIOR)
    assert np.isneginf(mixed[70])
    assert np.isfinite(np.delete(mixed, 70)).all()
    assert np.isfinite(fitted_gate(log_probs[:, 70:71], np.array([0]), PRIOR).coefficients).all()


def test_of_conversations_only_answers_count() -> None:
    log_probs, starts = text(20, 5)
    counted = np.arange(log_probs.shape[1]) % 3 > 0
    gate = fitted_gate(log_probs, starts, PRIOR, counted)
    assert gate != fitted_gate(log_probs, starts, PRIOR)
    score = gated_mixture_log_probs(log_probs, starts, gate, log_prior=PRIOR)[counted].mean()
    everything = gated_mixture_log_probs(log_probs, starts, fitted_gate(log_probs, starts, PRIOR), log_prior=PRIOR)
    assert score >= everything[counted].mean() - 1e-6


def test_long_text_is_fitted_by_some_of_its_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs, starts = text(20, 6)
    counted = np.arange(log_probs.shape[1]) % 5 > 0
    some = [block for block in range(20) if block % 3 == 0]
    columns = np.concatenate([np.arange(32 * block, 32 * block + 32) for block in some])
    expected = fitted_gate(log_probs[:, columns], np.arange(len(some)) * 32, PRIOR, counted[columns])
    monkeypatch.setattr(gate_module, "_FITTED", log_probs.size // 3)
    assert fitted_gate(log_probs, starts, PRIOR, counted) == expected


def test_any_number_of_blocks_at_once_gives_the_same_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    log_probs, starts = text(20, 7)
    log_probs[:, 70] = -np.inf
    at_once = fitted_gate(log_probs, starts, PRIOR)
    monkeypatch.setattr(gate_module, "_AT_ONCE", 3 * 6 * 32 * 2)  # two blocks
    assert fitted_gate(log_probs, starts, PRIOR) == at_once
