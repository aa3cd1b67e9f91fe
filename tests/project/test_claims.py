"""benchmarks/claims: verdicts follow from figures and bounds, readings from units, and docs/claims.md from both."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from helpers.claim_units import curve_units, write_family


@pytest.fixture
def claim_of(load: Any, tmp_path: Path) -> Any:
    """Judge a claim with these (values by seed, bound) as its figures."""
    claims = load("claims.claim")

    def judged(*figures: tuple[dict[int, float], Any]) -> Any:
        found = [claims.Figure("a figure", values, bound) for values, bound in figures]
        claim = claims.Claim("A claim", "It is true.", "a paper", "small", "    make", (), lambda evidence: found)
        return claims.judged(claim, claims.Evidence(tmp_path))

    return judged


def figures_of(load: Any, folder: Path, module: str, read: str) -> dict[str, float]:
    """What a reading finds for random seed 1, by label."""
    found = getattr(load(f"claims.{module}"), read)(load("claims.claim").Evidence(folder))
    return {figure.label: figure.by_seed[1] for figure in found}


def test_a_claim_holds_if_every_random_seed_of_every_figure_meets_its_bound(load: Any, claim_of: Any) -> None:
    below = load("claims.claim").Bound("<", 1)
    assert claim_of(({1: 0.9, 2: 0.95}, below), ({1: 0.8}, below), ({1: 7.0}, None)).verdict == "holds"
    assert claim_of(({1: 0.9, 2: 1.1}, below)).verdict == "holds in part"
    assert claim_of(({1: 0.9, 2: 0.9}, below), ({1: 1.0, 2: 1.2}, below)).verdict == "holds in part"
    assert claim_of(({1: 1.0, 2: 1.2}, below)).verdict == "does not hold at this size"


def test_a_verdict_of_one_random_seed_says_so(load: Any, claim_of: Any) -> None:
    below = load("claims.claim").Bound("<", 1)
    assert claim_of(({1: 0.9}, below)).sentence == "holds (one seed)"
    assert claim_of(({1: 0.9, 2: 0.9}, below), ({1: 0.9}, below)).sentence == "holds (some figures of one seed)"
    assert claim_of(({1: 0.9, 2: 0.9}, below), ({1: 0.9}, None)).sentence == "holds"


def test_a_value_that_is_only_a_limit_counts_where_it_decides_the_bound(load: Any, tmp_path: Path) -> None:
    claims = load("claims.claim")
    above, below = claims.Bound(">", 1), claims.Bound("<", 1)
    assert above.decided(1.0, ">") is True  # more than 1
    assert above.decided(1.0, "<") is False
    assert above.decided(0.9, ">") is None
    assert above.decided(1.1, "<") is None
    assert below.decided(1.0, "<") is True
    assert below.decided(1.0, ">") is False
    assert below.decided(0.9, ">") is None
    figures = [claims.Figure("a figure", {1: 2.0, 2: 0.5}, above, {2: ">"})]
    claim = claims.Claim("A claim", "It is true.", "a paper", "small", "make", (), lambda evidence: figures)
    assert claims.judged(claim, claims.Evidence(tmp_path)).sentence == "holds (one seed)"
    figures[:] = [claims.Figure("a figure", {2: 0.5}, above, {2: ">"})]
    assert claims.judged(claim, claims.Evidence(tmp_path)).sentence == "undecided"


def test_a_claim_that_no_figure_can_refute_is_an_error(claim_of: Any) -> None:
    with pytest.raises(ValueError, match="no verdict"):
        claim_of(({1: 0.9}, None))


def test_without_results_every_claim_is_not_measured_and_has_a_command(load: Any, tmp_path: Path) -> None:
    page, claims = load("claims.page"), load("claims.claim")
    for claim in page.CLAIMS:
        assert claims.judged(claim, claims.Evidence(tmp_path)).verdict == "not measured", claim.title
    text = page.claims_page(tmp_path)
    assert text.count("**Not measured** yet:") == len(page.CLAIMS)
    assert f"Of {len(page.CLAIMS)} claims, 0 are measured: 0 hold, 0 hold in part, and 0 do not hold" in text
    assert ".json`]" not in text


def test_a_committed_figure_that_contradicts_its_claim_has_a_likely_reason(load: Any) -> None:
    page, claims = load("claims.page"), load("claims.claim")
    found = [claims.judged(claim, claims.Evidence(page.RESULTS)) for claim in page.CLAIMS]
    unexplained = [one.claim.title for one in found if one.contradicts and not one.claim.reason]
    assert unexplained == [], "give Claim a `reason`: why the figures probably differ from the paper"


def test_every_claim_names_its_source_and_has_a_separate_heading(load: Any) -> None:
    page = load("claims.page")
    titles = [claim.title for claim in page.CLAIMS]
    assert len(titles) >= 14
    assert len(set(titles)) == len(titles)
    for claim in page.CLAIMS:
        assert "arXiv" in claim.source or "this project" in claim.source, claim.title


def test_units_that_were_evaluated_on_different_text_are_not_compared(load: Any, tmp_path: Path) -> None:
    units = curve_units({"1": {"dense": 10.0}, "4": {"dense": 11.0}, "16": {"dense": 12.0}})
    units["4/seed-1"]["bytes"]["math"] = 999
    write_family(tmp_path, "local-steps", units)
    with pytest.raises(ValueError, match="different text"):
        figures_of(load, tmp_path, "comparisons", "local_steps")


def test_seed_share_is_read_at_every_point(load: Any, tmp_path: Path) -> None:
    shares = load("claims.seed_share")
    values = {"0": (30.0, 900.0), "0.25": (22.0, 40.0), "0.5": (20.0, 30.0), "0.75": (21.0, 25.0), "1": (25.0, 24.5)}
    curves = {
        share: {"ensemble": ensemble, "average:uniform": average, "average:posterior": ensemble}
        for share, (ensemble, average) in values.items()
    }
    curves["0.5"]["dense"] = 25.0
    write_family(tmp_path, "seed-share", curve_units(curves))
    evidence = load("claims.claim").Evidence(tmp_path)
    by_label = {figure.label: figure.by_seed for figure in shares.optimum(evidence)}
    assert by_label["`ensemble` at 0.5 / `ensemble` at 0"] == {1: pytest.approx(2 / 3), 2: pytest.approx(2 / 3)}
    assert by_label["`ensemble` at 0.25 / `dense`"] == {1: 0.88, 2: 0.88}
    assert shares.average_wants_more(evidence)[0].by_seed == {1: 0.25, 2: 0.25}
    assert shares.no_seed_no_average(evidence)[0].by_seed == {1: 36.0, 2: 36.0}


def test_a_measured_curve_is_drawn_with_what_exceeds_it_as_an_arrow(load: Any, tmp_path: Path) -> None:
    page = load("claims.page")
    assert page.plots(tmp_path) == {}
    averages = {"0": 900.0, "0.25": 40.0, "0.5": 30.0, "0.75": 27.0, "1": 25.5}
    curves = {share: {"ensemble": 20.0, "average:uniform": value, "dense": 25.0} for share, value in averages.items()}
    write_family(tmp_path, "seed-share", curve_units(curves))
    (name, svg), *others = page.plots(tmp_path).items()
    assert (name, others) == ("claims-seed-share.svg", [])
    assert f"(images/{name})" in page.claims_page(tmp_path)
    drawn = ElementTree.fromstring(svg)
    space = "{http://www.w3.org/2000/svg}"
    assert len(drawn.findall(f"{space}polyline")) == 2
    assert len(drawn.findall(f"{space}path")) == 2  # the average without a seed LM, for each random seed
    legend = 2
    assert len(drawn.findall(f"{space}circle")) == legend + 2 * (5 + 4)


def test_a_family_with_some_units_missing_is_judged_by_those_that_exist(load: Any, tmp_path: Path) -> None:
    claims, page = load("claims.claim"), load("claims.page")
    by_title = {claim.title: claim for claim in page.CLAIMS}
    curves = {share: {"ensemble": 20.0, "average:uniform": 300.0} for share in ("0", "0.25", "0.5")}
    curves["0.5"]["dense"] = 25.0
    write_family(tmp_path, "seed-share", curve_units(curves, seeds=(1,)))
    evidence = claims.Evidence(tmp_path)
    assert claims.judged(by_title["Averages without a seed LM"], evidence).sentence == "holds (one seed)"
    assert claims.judged(by_title["Seed share"], evidence).verdict == "not measured"
    assert "[`claims/seed-share.json`](../benchmarks/results/claims/seed-share.json)" in page.claims_page(tmp_path)


def test_the_gain_of_more_domains_is_compared_with_that_of_fewer(load: Any, tmp_path: Path) -> None:
    ensembles = {"2": 36.0, "4": 32.0, "8": 30.0, "16": 28.0, "32": 20.0}
    curves = {
        at: {"dense": 40.0, "ensemble": value, "ensemble:top2": 1.5 * value, "ensemble:top4": 1.25 * value}
        for at, value in ensembles.items()
    }
    for at in curves:
        curves[at]["ensemble:top8"] = curves[at]["ensemble"]
    curves["given"] = {"dense": 40.0, "ensemble": 24.0, "ensemble:tempered": 24.0}
    curves["8"]["ensemble:tempered"] = 24.0
    write_family(tmp_path, "domains", curve_units(curves))
    gains = figures_of(load, tmp_path, "number_of_domains", "growing_gain")
    assert gains["`ensemble` / `dense`, 32 clusters"] == 0.5
    assert gains["ratio to dense with 32 clusters over that with 16"] == pytest.approx(20 / 28)
    assert figures_of(load, tmp_path, "number_of_domains", "clusters_and_given") == {
        "`ensemble` / `dense` of 8 clusters over that of the 8 given domains": 1.25,
        "`ensemble` of 8 clusters / of the 8 given domains": 1.25,
        "`ensemble:tempered` of 8 clusters / of the 8 given domains": 1.0,
        "`dense` of 8 clusters / of the 8 given domains": 1.0,
    }
    assert (
        figures_of(load, tmp_path, "number_of_domains", "few_of_many")["`ensemble:top4` / `ensemble`, 32 clusters"]
        == 1.25
    )


def test_dense_equivalents_use_the_longer_baselines_of_one_random_seed(load: Any, tmp_path: Path) -> None:
    curves = {at: {"dense": 40.0, "ensemble": 40.0 / 2**0.5} for at in ("2", "4", "8", "16")}
    curves["32"] = {"dense": 40.0, "ensemble": 15.0}
    units = curve_units(curves)
    page, claims = load("claims.page"), load("claims.claim")
    (claim,) = (one for one in page.CLAIMS if one.title == "Compute and the number of domains")
    write_family(tmp_path, "domains", units)
    assert claims.judged(claim, claims.Evidence(tmp_path)).verdict == "not measured"
    units |= curve_units({"dense": {"dense": 80.0, "dense-2x": 40.0}}, seeds=(1,))
    write_family(tmp_path, "domains", units)
    found = {figure.label: figure for figure in claims.judged(claim, claims.Evidence(tmp_path)).figures}
    assert found["dense-equivalent compute of `ensemble`, 8 clusters"].by_seed == {
        1: pytest.approx(2**0.5),
        2: pytest.approx(2**0.5),
    }
    assert found["dense-equivalent compute of `ensemble`, 32 clusters"].beyond == {1: ">", 2: ">"}
    assert "> 2.000" in page.claims_page(tmp_path)
    grown = found["equivalent with 32 clusters over that with 8"]
    assert grown.by_seed == {seed: pytest.approx(2**0.5) for seed in (1, 2)}
    assert grown.beyond == {1: ">", 2: ">"}
    for unit in units.values():
        unit["perplexity"]["ensemble"] = dict.fromkeys(unit["perplexity"].get("dense", ()), 15.0)
    write_family(tmp_path, "domains", units)  # both are more than the strongest baseline: which is larger is unknown
    assert claims.judged(claim, claims.Evidence(tmp_path)).verdict == "not measured"


def test_experts_of_new_domains_are_compared_on_new_and_on_old_domains(load: Any, tmp_path: Path) -> None:
    ways = {
        "carried": {"expert:med": 20.0, "expert:python": 20.0, "seed": 10.0},
        "rewarmed": {"expert:med": 16.0, "expert:python": 16.0, "seed": 10.0},
        "replayed": {"expert:med": 16.8, "expert:python": 16.8, "seed": 10.0},
    }
    units = curve_units(ways, domains=("math", "legal", "med", "python"))
    for unit in units.values():
        after = {"carried": 30.0, "rewarmed": 40.0, "replayed": 20.0}[unit["point"]]
        for name in ("med", "python"):
            unit["perplexity"][f"expert:{name}"] |= {"math": after, "legal": after}
    write_family(tmp_path, "continued", units)
    assert figures_of(load, tmp_path, "comparisons", "rewarming") == {
        "new domains: rewarmed / carried schedule": 0.8,
        "old domains: rewarmed / carried schedule": pytest.approx(4 / 3),
    }
    without, beyond_half, with_it, cost = figures_of(load, tmp_path, "comparisons", "replay").values()
    assert without == pytest.approx(math.log(4))
    assert with_it == pytest.approx(math.log(2))
    assert beyond_half == pytest.approx(0)
    assert cost == pytest.approx(1.05)


def test_other_families_compare_their_points(load: Any, tmp_path: Path) -> None:
    dense = {"dense": 10.0}
    write_family(tmp_path, "local-steps", curve_units({"1": dense, "4": {"dense": 11.0}, "16": {"dense": 12.0}}))
    assert list(figures_of(load, tmp_path, "comparisons", "local_steps").values()) == [1.1, 1.2]
    methods = {"ensemble": 9.0, "average:posterior": 9.5, "average:uniform": 15.0, "dense": 10.0}
    write_family(tmp_path, "sizes", curve_units(dict.fromkeys(("1m", "4m", "30m"), methods)))
    found = list(figures_of(load, tmp_path, "comparisons", "sizes").values())
    assert found == [*[0.9] * 3, *[0.95] * 3, *[1.5] * 3]
    points = {"chosen": dense, "lr-1.5e-3": {"dense": 12.5}, "lr-6e-3": {"dense": 10.0}, "beta2-0.98": {"dense": 8.0}}
    points["batch-2048"] = {"dense": 16.0}
    write_family(tmp_path, "tuning", curve_units(points, seeds=(1,)))
    assert list(figures_of(load, tmp_path, "comparisons", "tuning").values()) == [0.8, 1.0, 1.25, 0.625]
    domains = ("math", "legal", "med", "python")
    points = {"throughout": dense, "late": {"dense": 9.0}, "equal": {"dense": 12.0}}
    write_family(tmp_path, "late", curve_units(points, domains=domains))
    assert list(figures_of(load, tmp_path, "comparisons", "late_upweighting").values()) == [0.9, 0.9, 0.75]
    write_family(tmp_path, "tokenizers", curve_units({"1024": dense, "4096": {"dense": 15.0}, "8192": {"dense": 20.0}}))
    assert list(figures_of(load, tmp_path, "comparisons", "bits_per_byte").values()) == [2.0, 2.0, 1.5, 1.5]
    points = {"equal": {"ensemble": 10.0}, "harder-longer": {"ensemble": 9.0}, "easier-longer": {"ensemble": 11.0}}
    write_family(tmp_path, "difficulty", curve_units(points))
    assert list(figures_of(load, tmp_path, "comparisons", "steps_by_difficulty").values()) == [0.9, 1.1, 0.9, 1.1]
    points = {"same-size": {"ensemble": 10.0}, "harder-larger": {"ensemble": 8.0}}
    units = curve_units(points)
    for unit in units.values():
        unit["compute"]["ensemble"] = {"tokens": 1, "flops": 99.0 if unit["point"] == "harder-larger" else 100.0}
    write_family(tmp_path, "difficulty", units)
    assert list(figures_of(load, tmp_path, "comparisons", "sizes_by_difficulty").values()) == [0.8, 0.8, 0.99]
    added = ("med", "news", "cs", "wiki")
    own = {"seed": 8.0, "posterior": 6.0}
    ways = {way: {"ensemble": 8.0, **{f"expert:{name}": value for name in added}} for way, value in own.items()}
    write_family(tmp_path, "rounds", curve_units(ways, domains=added))
    assert list(figures_of(load, tmp_path, "comparisons", "later_rounds").values()) == [0.75, 0.75, 1.0]
