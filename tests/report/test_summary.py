from __future__ import annotations

import math

import pytest

from btm_scale.report.summary import headline, lowest, lowest_means, mean, moe_sentence, ordered_methods, ratio


def test_a_mean_is_arithmetic_and_leaves_novel_domains_out(make_results):
    results = make_results()
    assert headline(results).startswith("The ensemble's mean perplexity over 2 domains is 13.50,")
    assert mean(results, "dense", ["math", "code"]).value == pytest.approx(15.0)


def test_a_method_that_lacks_a_domain_is_compared_on_the_shared_ones_and_marked(make_results):
    results = make_results()
    del results.methods["ensemble"].perplexity["code"]
    against = ratio(results, "ensemble", "dense", ["math", "code"])
    assert against.value == pytest.approx(0.9)
    assert against.partial
    assert mean(results, "ensemble", ["math", "code"]).partial
    # A mean over an easier half must not be called the best.
    assert "ensemble" not in lowest_means(results, ["math", "code"])


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (0.9, "0.900 times the dense baseline's at equal training compute."),
        (1.1, "1.100 times the dense baseline's at equal training compute: worse than one dense model."),
        (1.0, "the same as the dense baseline's at equal training compute."),
    ],
)
def test_the_headline_says_better_worse_or_the_same(make_results, share, said):
    results = make_results(shares={"seed": 1.2, "dense": 1.0, "ensemble": share}, novel=())
    assert headline(results).endswith(said)


def test_the_headline_claims_equal_compute_only_where_it_was_equal(make_results):
    results = make_results(novel=())
    doubled = results.compute["ensemble"].model_copy(update={"flops": 2 * results.compute["ensemble"].flops})
    results.compute["ensemble"] = doubled
    assert "with 2.000 times its training compute" in headline(results)
    results.compute.clear()
    assert "compute" not in headline(results)


def test_the_headline_tells_of_novel_domains_even_when_they_went_badly(make_results):
    results = make_results()
    results.methods["ensemble"].perplexity["poems"] = 33.0
    assert headline(results).endswith("On 1 novel domain, never trained on, it is 33.00, 1.100 times dense's.")


def test_the_headline_without_dense_without_ensemble_and_without_anything(make_results):
    assert "no dense baseline" in headline(make_results(dense=False))
    assert "by Dense baseline" in headline(make_results(shares={"dense": 0.8}))
    assert headline(make_results(shares={}, training=())) == "No method has a mean perplexity over these domains yet."


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (1.08, "is 1.200 times the ensemble's: routing by the posterior wins."),
        (0.81, "is 0.900 times the ensemble's: routing each token wins."),
        (0.9, "is the same as the ensemble's: neither is better."),
    ],
)
def test_a_sentence_says_whether_the_mixture_of_experts_beats_the_ensemble(make_results, share, said):
    results = make_results(shares={"ensemble": 0.9, "moe": share})
    assert moe_sentence(results) == f"The mean perplexity of the mixture of experts over 2 domains {said}"
    del results.methods["moe"].perplexity["code"]
    assert "over 1 domain " in moe_sentence(results)


def test_nothing_is_said_of_a_mixture_of_experts_that_a_run_lacks(make_results):
    assert moe_sentence(make_results()) == ""
    assert moe_sentence(make_results(shares={"moe": 0.9})) == ""


def test_nan_is_never_the_lowest():
    assert lowest({"a": math.nan, "b": 2.0, "c": None, "d": 3.0}) == {"b"}
    assert lowest({"a": math.nan}) == set()


def test_numbers_that_are_printed_alike_are_equally_low():
    assert lowest({"a": 177.61, "b": 177.64, "c": 177.8}) == {"a", "b"}


def test_every_method_is_listed_once_unknown_ones_too(make_results):
    results = make_results(shares={"ensemble:token": 1.1, "my-own": 1.0, "ensemble": 0.9, "dense": 1.0, "seed": 1.2})
    order = ordered_methods(results)
    assert sorted(order) == sorted(results.methods)
    assert order[:4] == ["seed", "dense", "ensemble", "ensemble:token"]
