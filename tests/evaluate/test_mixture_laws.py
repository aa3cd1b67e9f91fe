"""The laws of mixtures: recovered from noisy losses, chosen by what they predict, and minimized under limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btm_scale.evaluate.mixture_law import LAWS, Fit, Law, Quadratic, chosen, fit_laws, needed
from btm_scale.evaluate.mixture_optimum import lowest_mean, meets
from btm_scale.evaluate.mixture_runs import drawn

NOISE = 1e-3  # nats
BY_NAME = {law.name: law for law in LAWS}
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(2, 5)


def some_parameters(law: Law, components: int, random: np.random.Generator) -> np.ndarray:
    """Return parameters of plausible losses, between about 1 and 6 nats."""
    if law.name == "exponential":
        return np.concatenate([random.uniform(1.0, 2.0, 1), random.uniform(-2.5, 1.2, components)])
    parameters = random.uniform(2.0, 4.0, law.size(components))
    parameters[components:] = random.uniform(-2.0, 2.0, law.size(components) - components)
    return parameters


def some_mixtures(components: int, count: int, random: np.random.Generator) -> np.ndarray:
    return np.concatenate([np.eye(components), random.dirichlet(np.ones(components), count - components)])


def a_fit(law: Law, parameters: np.ndarray) -> Fit:
    return Fit(law, parameters, np.zeros(0), 0.0, 1.0)


@pytest.mark.parametrize("name", BY_NAME)
@settings(max_examples=20)
@given(random_seed=seeds, components=sizes)
def test_a_law_is_recovered_from_noisy_losses(name: str, random_seed: int, components: int) -> None:
    random, law = np.random.default_rng(random_seed), BY_NAME[name]
    truth = some_parameters(law, components, random)
    mixtures = some_mixtures(components, 3 * law.size(components) + 6, random)
    noisy = law.loss(truth, mixtures) + NOISE * random.standard_normal(len(mixtures))
    unseen = random.dirichlet(np.ones(components), 50)
    fits = fit_laws(mixtures, noisy)
    errors = fits[name].loss(unseen) - law.loss(truth, unseen)
    assert np.sqrt(np.mean(errors**2)) < 2 * NOISE
    assert fits[name].error < 4 * NOISE
    best = chosen(fits)
    assert best.error <= fits[name].error
    unseen_errors = best.loss(unseen) - law.loss(truth, unseen)
    assert np.sqrt(np.mean(unseen_errors**2)) < 4 * NOISE


@settings(max_examples=20)
@given(random_seed=seeds, components=sizes)
def test_the_order_of_the_components_changes_no_prediction(random_seed: int, components: int) -> None:
    random = np.random.default_rng(random_seed)
    mixtures = some_mixtures(components, needed(LAWS[-1], components) + 4, random)
    losses = LAWS[-1].loss(some_parameters(LAWS[-1], components, random), mixtures)
    order = random.permutation(components)
    ours, theirs = fit_laws(mixtures, losses), fit_laws(mixtures[:, order], losses)
    unseen = random.dirichlet(np.ones(components), 9)
    for name in ("linear", "quadratic"):
        assert theirs[name].loss(unseen[:, order]) == pytest.approx(ours[name].loss(unseen), abs=1e-6)
        assert theirs[name].error == pytest.approx(ours[name].error, abs=1e-6)


def test_a_left_out_mixture_is_predicted_by_the_fit_to_the_others() -> None:
    random = np.random.default_rng(3)
    mixtures = some_mixtures(3, 14, random)
    losses = random.uniform(1.0, 4.0, 14)
    for law in LAWS:
        left_out = law.left_out(mixtures, losses, law.fit(mixtures, losses))
        for i in (0, 7):
            others = np.arange(14) != i
            start = law.fit(mixtures, losses)
            alone = law.loss(law.fit(mixtures[others], losses[others], start), mixtures[i : i + 1])[0]
            assert left_out[i] == pytest.approx(alone, abs=1e-3)


def test_a_law_with_more_parameters_than_mixtures_is_not_fitted() -> None:
    random = np.random.default_rng(0)
    mixtures = some_mixtures(4, 10, random)
    assert [needed(law, 4) for law in LAWS] == [5, 6, 11]
    assert list(fit_laws(mixtures, random.uniform(1, 2, 10))) == ["linear", "exponential"]
    assert list(fit_laws(mixtures[:4], random.uniform(1, 2, 4))) == []


@settings(max_examples=20)
@given(random_seed=seeds, components=sizes, limits=st.integers(0, 2))
def test_the_lowest_mean_meets_every_limit_and_no_sampled_mixture_that_does_is_better(
    random_seed: int, components: int, limits: int
) -> None:
    random = np.random.default_rng(random_seed)
    fits = [a_fit(law, some_parameters(law, components, random)) for law in random.choice(LAWS, 3)]
    allowed = random.dirichlet(np.ones(components))
    limited = [(fit, float(fit.loss(allowed[None])[0]) + 0.02) for fit in fits[:limits]]
    targets = [(fits[2], 0.7), (fits[1], 0.3)]
    sampled = np.concatenate([allowed[None], np.eye(components), random.dirichlet(np.ones(components), 400)])
    found = lowest_mean(targets, limited, sampled[-20:])
    assert found is not None
    assert found.sum() == pytest.approx(1.0)
    assert found.min() >= 0.0
    assert meets(limited, found)
    means = sum(weight * np.exp(fit.loss(np.vstack([found, sampled]))) for fit, weight in targets)
    inside = np.array([meets(limited, mixture) for mixture in sampled])
    assert means[0] <= means[1:][inside].min() * (1 + 1e-3)


def test_limits_that_no_mixture_meets_have_no_answer() -> None:
    fit = a_fit(BY_NAME["linear"], np.array([2.0, 3.0]))
    assert lowest_mean([(fit, 1.0)], [(fit, 1.9)], np.eye(2)) is None
    found = lowest_mean([(fit, 1.0)], [(fit, 2.1)], np.eye(2))
    assert found == pytest.approx([1.0, 0.0], abs=1e-4)


def test_the_leverage_is_the_largest_where_nothing_was_measured() -> None:
    random = np.random.default_rng(0)
    mixtures = 0.2 + 0.4 * random.dirichlet(np.ones(3), 20)  # near the middle
    fit = chosen(fit_laws(mixtures, LAWS[-1].loss(some_parameters(LAWS[-1], 3, random), mixtures)))
    leverage = fit.leverages(np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]), mixtures)
    assert leverage[0] > fit.leverages(mixtures, mixtures).max() > leverage[1]


@pytest.mark.parametrize(("components", "measured"), [(2, 3), (5, 6), (5, 14), (5, 15), (16, 40), (24, 100)])
def test_the_uncertainty_is_that_of_the_fitted_parameters_however_few_mixtures_are_measured(
    components: int, measured: int
) -> None:
    generator = np.random.default_rng(components)
    mixtures, candidates = (generator.dirichlet(np.ones(components), count) for count in (measured, 8))
    law = Quadratic()
    known, terms = law.terms(mixtures), law.terms(candidates)
    covariance = np.linalg.inv(known.T @ known + 1e-4 * np.eye(law.size(components)))
    expected = np.einsum("ni,ij,nj->n", terms, covariance, terms)
    np.testing.assert_allclose(law.uncertainty(mixtures, candidates), expected, rtol=1e-6)


def test_drawing_mixtures_of_many_models_solves_no_system_larger_than_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    solve, sizes = np.linalg.solve, list[int]()

    def noted(matrix: np.ndarray, right: np.ndarray) -> np.ndarray:
        sizes.append(len(matrix))
        return solve(matrix, right)

    monkeypatch.setattr(np.linalg, "solve", noted)
    assert len(drawn([f"m{number:02d}" for number in range(30)], 40)) == 40
    assert max(sizes) == 39


@pytest.mark.parametrize("random_seed", [2, 15, 18, 52, 108, 160])
def test_a_limit_that_divides_the_simplex_hides_no_better_mixture(random_seed: int) -> None:
    """In the first three, rounding takes the mixture onto the limit; in the others, the first starts share a valley."""
    random, law, components = np.random.default_rng(random_seed), Quadratic(), 5

    def surface() -> Fit:
        parameters = random.uniform(2.0, 4.0, law.size(components))
        parameters[components:] = random.uniform(-1.0, 1.0, law.size(components) - components)
        return a_fit(law, parameters)

    target, limited = surface(), surface()
    most = float(np.quantile(limited.loss(random.dirichlet(np.ones(components), 200)), 0.3))
    found = lowest_mean([(target, 1.0)], [(limited, most)], np.eye(components))
    assert found is not None
    assert meets([(limited, most)], found)
    sampled = np.concatenate([random.dirichlet(np.full(components, sharp), 20_000) for sharp in (1.0, 0.3, 0.1)])
    lowest = target.loss(sampled[limited.loss(sampled) <= most]).min()
    assert target.loss(found[None])[0] <= lowest + 1e-4
