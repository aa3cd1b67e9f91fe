"""The predicted loss of a model that is trained on a mixture: its definition, its derivatives, what it is for."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.mixtures import chosen_mixture, known_loss

from btm_scale.evaluate.mixture_law import LAWS, Law
from btm_scale.evaluate.mixture_optimum import log_mean, lowest_mean
from btm_scale.evaluate.mixture_runs import drawn
from btm_scale.evaluate.mixture_trained import TrainedLoss

MODELS = 4
SEED = 3


def surfaces(law: Law, count: int) -> list[tuple[TrainedLoss, np.ndarray]]:
    """Return random surfaces, each with a mixture inside the simplex."""
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        parameters = random.uniform(-1.0, 1.0, law.size(MODELS))
        parameters[0] += 2.0
        if law.name == "quadratic":
            parameters[MODELS:] = random.uniform(-4.0, 1.0, law.size(MODELS) - MODELS)
        related = random.uniform(0.0, 1.0, MODELS) * (random.uniform(size=MODELS) < 0.5)
        surface = TrainedLoss(law, parameters, SEED, related if related.any() else np.eye(MODELS)[0])
        found.append((surface, random.dirichlet(np.ones(MODELS))))
    return found


def expected(surface: TrainedLoss, mixture: np.ndarray) -> float:
    """Return the loss by its definition, with the line to the seed LM sampled."""

    def average(mixtures: np.ndarray) -> np.ndarray:
        return surface.law.loss(surface.parameters, mixtures)

    corners = np.eye(MODELS)
    line = mixture + np.linspace(0.0, 1.0, 20_001)[:, None] * (corners[SEED] - mixture)
    alone = average(corners)
    experts = [j for j in range(MODELS) if j != SEED and surface.related[j] > 0]
    own = min(experts, key=lambda j: alone[j], default=SEED)
    gain = max(alone[SEED] - alone[own], 0.0)
    text = mixture @ surface.related
    learned = alone[SEED] - gain * min(text / (surface.related[own] or 1.0), 1.0) ** 0.5
    kept = min(average(line).min(), learned)
    return float(kept + np.exp(-text / 0.01) * (average(mixture[None])[0] - kept))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_the_loss_is_the_lowest_of_the_line_to_the_seed_and_what_the_own_text_teaches(law: Law) -> None:
    for surface, mixture in surfaces(law, 100):
        assert surface.loss(mixture[None])[0] == pytest.approx(expected(surface, mixture), abs=1e-7)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_the_derivatives_are_those_of_the_loss(law: Law) -> None:
    step = 1e-6
    for surface, mixture in surfaces(law, 100):
        gradient, hessian = surface.derivatives(mixture)
        for j, direction in enumerate(np.eye(MODELS) * step):
            ahead, behind = mixture + direction, mixture - direction
            slope = np.diff(surface.loss(np.stack([behind, ahead])))[0] / (2 * step)
            assert gradient[j] == pytest.approx(slope, rel=1e-4, abs=1e-4)
            slopes = (surface.derivatives(ahead)[0] - surface.derivatives(behind)[0]) / (2 * step)
            np.testing.assert_allclose(hessian[j], slopes, rtol=1e-3, atol=1e-3)


def test_a_domain_that_a_mixture_leaves_out_is_forgotten_as_the_average_forgets_it() -> None:
    surface, _ = surfaces(LAWS[-1], 1)[0]
    surface = TrainedLoss(surface.law, surface.parameters, SEED, np.eye(MODELS)[0])
    without = np.array([[0.0, 0.5, 0.5, 0.0]])
    assert surface.loss(without) == pytest.approx(surface.law.loss(surface.parameters, without))


def test_a_loss_that_is_the_same_everywhere_has_no_slope_on_the_simplex() -> None:
    within = np.eye(MODELS) - 1.0 / MODELS  # projects onto the directions that keep the sum of the weights
    for law in LAWS:
        parameters = np.zeros(law.size(MODELS))
        parameters[: MODELS if law.name != "exponential" else 1] = 2.0
        surface = TrainedLoss(law, parameters, SEED, np.eye(MODELS)[0])
        for mixture in np.random.default_rng(0).dirichlet(np.ones(MODELS), 50):
            gradient, hessian = surface.derivatives(mixture)
            np.testing.assert_allclose(within @ gradient, 0.0, atol=1e-9)
            np.testing.assert_allclose(within @ hessian @ within, 0.0, atol=1e-9)


def test_no_sampled_mixture_has_a_lower_mean_than_the_one_that_is_found() -> None:
    random = np.random.default_rng(1)
    samples = np.concatenate([random.dirichlet(np.full(MODELS, alpha), 4000) for alpha in (0.2, 0.5, 1.0)])
    for case in range(5):
        law, targets = LAWS[-1], []
        for own in range(MODELS - 1):
            parameters = random.uniform(2.5, 4.5, law.size(MODELS))
            parameters[own] = 1.5
            parameters[MODELS:] = random.uniform(-4.0, 0.5, law.size(MODELS) - MODELS)
            targets.append((TrainedLoss(law, parameters, SEED, np.eye(MODELS)[own]), 1 / 3))
        found = lowest_mean(targets, [], drawn_mixtures(24))
        assert found is not None
        assert log_mean(targets, found[None])[0] <= log_mean(targets, samples).min() + 1e-6, case


def drawn_mixtures(count: int) -> np.ndarray:
    """Return the mixtures that `btm-scale mixture` would measure, as starts."""
    names = [f"m{j}" for j in range(MODELS)]
    return np.array([[one.get(name, 0.0) for name in names] for one in drawn(names, count)])


def interfering(weights: dict[str, float], text: str) -> float:
    """Return the loss of averages of experts that pull one another away from what the seed LM knows."""
    others = sum(weight for name, weight in weights.items() if name not in (text, "seed"))
    own = weights.get(text, 0.0)
    return 3.0 - own + 2.0 * others - 0.5 * own * others


def test_averages_that_interfere_do_not_make_a_mixture_of_one_domain_the_best() -> None:
    chosen = chosen_mixture(["math", "code", "seed"], loss=interfering)  # type: ignore[arg-type]
    assert chosen.weights["seed"] == 0.0  # replayed text helps on neither target
    assert chosen.weights["math"] == pytest.approx(0.5, abs=1e-3)
    assert chosen.mean.trained is not None
    assert chosen.mean.trained < chosen.mean.seed < chosen.mean.predicted
    assert chosen.mean.trained == pytest.approx(np.mean([one.trained for one in chosen.perplexity.values()]))
    assert chosen.mean.trained <= chosen.mean.trained_uniform


def test_without_a_seed_model_the_average_is_minimized_and_no_training_is_predicted() -> None:
    chosen = chosen_mixture(["math", "code", "law"])
    assert chosen.mean.trained is None
    assert all(one.trained is None for one in chosen.perplexity.values())
    lowest = min(one.mean for one in chosen.measured)
    assert chosen.mean.predicted <= lowest * (1 + 1e-6)


def test_limits_are_on_the_average_which_forgets_more() -> None:
    chosen = chosen_mixture(["a", "b", "seed"], keep={"general": 0.73})
    kept = chosen.perplexity["general"]
    assert kept.predicted <= 0.73 * np.exp(known_loss({"seed": 1.0}, "general")) * (1 + 1e-6)
    assert kept.trained is not None
    assert kept.trained <= kept.predicted * (1 + 1e-9)
