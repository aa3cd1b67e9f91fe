from __future__ import annotations

import pytest

from btm_scale.evaluate.results import Compute, EvaluatedDomain, MethodResult, Results
from btm_scale.report.equivalence import dense_equivalent, equivalence_sentence


def results(**perplexity: float) -> Results:
    """One domain; dense at 1x and 4x of compute, and whatever else is given."""
    values = {"dense": 40.0, "dense-4x": 20.0} | perplexity
    return Results(
        name="",
        random_seed=0,
        domains={
            name: EvaluatedDomain(novel=novel, tokens=1, bytes=1)
            for name, novel in {"math": False, "law": True}.items()
        },
        methods={
            name: MethodResult(perplexity={"math": value, "law": 1.0}, bits_per_byte={})
            for name, value in values.items()
        },
        compute={"dense": Compute(tokens=1, flops=1e12), "dense-4x": Compute(tokens=4, flops=4e12)},
    )


def test_between_two_baselines_it_lies_on_the_line_of_logarithms() -> None:
    times, sign = dense_equivalent(results(ensemble=40.0 / 2**0.5), "ensemble") or (0.0, "")
    assert (times, sign) == (pytest.approx(2.0), "=")


@pytest.mark.parametrize(("perplexity", "expected"), [(41.0, (1.0, "<")), (19.0, (4.0, ">")), (20.0, (4.0, "="))])
def test_beyond_the_baselines_only_a_bound_is_told(perplexity: float, expected: tuple[float, str]) -> None:
    times, sign = dense_equivalent(results(ensemble=perplexity), "ensemble") or (0.0, "")
    assert (times, sign) == (pytest.approx(expected[0]), expected[1])


def test_one_baseline_or_no_ensemble_tells_nothing() -> None:
    assert dense_equivalent(results(), "ensemble") is None
    single = results(ensemble=30.0)
    del single.methods["dense-4x"]
    assert equivalence_sentence(single, "ensemble", "Ensemble") == ""


def test_the_sentence_names_the_papers_figure_beside_ours() -> None:
    sentence = equivalence_sentence(results(ensemble=19.0), "ensemble", "The ensemble")
    assert sentence.startswith("The ensemble is worth more than 4.00 times the dense baseline's compute")
    assert "2.5 times" in sentence
