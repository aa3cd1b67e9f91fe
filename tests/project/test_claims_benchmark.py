"""benchmarks/claims: verdicts follow from figures and bounds, units that exist are skipped, docs/claims.md is true."""

from __future__ import annotations

import gzip
import importlib
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.configs import FOLDER
from btm_scale.errors import ConfigError
from btm_scale.evaluate.results import Results
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import model_names, training_job

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENVIRONMENT = {"hardware": {"cpu": "a CPU", "cores": 2}, "date": "2026-11-27T00:00:00"}
DOMAINS = ("math", "code")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def one(name: str) -> ModuleType:
        return importlib.import_module(name)

    return one


@pytest.fixture
def claim_of(load: Any, tmp_path: Path) -> Any:
    """Judge a claim with these (values by seed, bound) as its figures."""
    claims = load("claims.claim")

    def judged(*figures: tuple[dict[int, float], Any]) -> Any:
        found = [claims.Figure("a figure", values, bound) for values, bound in figures]
        claim = claims.Claim("A claim", "It is true.", "a paper", "small", "    make", (), lambda evidence: found)
        return claims.judged(claim, claims.Evidence(tmp_path))

    return judged


def curve_units(
    curves: dict[str, dict[str, float]], seeds: tuple[int, ...] = (1, 2), domains: tuple[str, ...] = DOMAINS
) -> dict[str, Any]:
    """The units of a family from perplexity by point and method, equal on all domains and for all seeds.

    Bits per byte are a tenth of it; `dense` is trained with 8 flops, and `dense-2x` with 16.
    """
    flops = {"dense": 8.0, "dense-2x": 16.0}
    return {
        f"{point}/seed-{seed}": {
            "seconds": 60,
            "point": point,
            "random_seed": seed,
            "bytes": dict.fromkeys(domains, 1000),
            "perplexity": {method: dict.fromkeys(domains, value) for method, value in methods.items()},
            "bits_per_byte": {method: dict.fromkeys(domains, value / 10) for method, value in methods.items()},
            "compute": {method: {"tokens": 1, "flops": flops[method]} for method in methods if method in flops},
        }
        for point, methods in curves.items()
        for seed in seeds
    }


def figures_of(load: Any, folder: Path, module: str, read: str) -> dict[str, float]:
    """What a reading finds for random seed 1, by label."""
    found = getattr(load(f"claims.{module}"), read)(load("claims.claim").Evidence(folder))
    return {figure.label: figure.by_seed[1] for figure in found}


def write_family(folder: Path, name: str, units: dict[str, Any]) -> None:
    path = folder / "claims" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"units": units, "environment": ENVIRONMENT}))


def test_a_claim_holds_if_every_random_seed_of_every_figure_meets_its_bound(load: Any, claim_of: Any) -> None:
    below = load("claims.claim").Bound("<", 1)
    assert claim_of(({1: 0.9, 2: 0.95}, below), ({1: 0.8}, below), ({1: 7.0}, None)).verdict == "holds"
    assert claim_of(({1: 0.9, 2: 1.1}, below)).verdict == "holds in part"
    assert claim_of(({1: 0.9, 2: 0.9}, below), ({1: 1.0, 2: 1.2}, below)).verdict == "holds in part"
    assert claim_of(({1: 1.0, 2: 1.2}, below)).verdict == "does not hold at this size"


def test_a_verdict_of_one_random_seed_says_so(load: Any, claim_of: Any) -> None:
    below = load("claims.claim").Bound("<", 1)
    assert claim_of(({1: 0.9}, below)).sentence == "holds (one seed)"
    assert claim_of(({1: 0.9, 2: 0.9}, below), ({1: 0.9}, below)).sentence == "holds (one seed)"
    assert claim_of(({1: 0.9, 2: 0.9}, below), ({1: 0.9}, None)).sentence == "holds"


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


def test_every_claim_names_its_source_and_has_a_heading_of_its_own(load: Any) -> None:
    page = load("claims.page")
    titles = [claim.title for claim in page.CLAIMS]
    assert len(titles) >= 14
    assert len(set(titles)) == len(titles)
    for claim in page.CLAIMS:
        assert "arXiv" in claim.source or "this project" in claim.source, claim.title


def test_every_family_is_the_evidence_of_a_claim_and_every_committed_json_has_a_family(load: Any) -> None:
    page, families = load("claims.page"), load("claims.families").families()
    used = {name.removeprefix("claims/") for claim in page.CLAIMS for name in claim.results if "/" in name}
    assert used == set(families)
    assert {path.stem for path in (page.RESULTS / "claims").glob("*.json")} <= set(families)


@pytest.mark.parametrize("name", [path.stem for path in sorted((FOLDER / "claims").glob("*.yaml"))])
def test_every_point_of_a_family_is_a_run_whose_models_can_be_trained(load: Any, tmp_path: Path, name: str) -> None:
    family = load("claims.families").families()[name]
    for point in family.config.points:
        values = family.values(point, 1, tmp_path)
        for one in (values, load("claims.training").shrunk(values)):
            path = tmp_path / "run.yaml"
            path.write_text(dump_text(one))
            config = RunConfig.load(path)
            assert set(family.domains) <= set(config.all_domains)
            for model in model_names(config):
                training_job(config, model)


def test_a_family_with_an_unknown_key_or_a_point_that_takes_too_long_is_refused(load: Any, tmp_path: Path) -> None:
    families, path = load("claims.families"), tmp_path / "wrong.yaml"
    point = {"minutes": 91, "rnu": {}}
    path.write_text(dump_text({"shares": "text", "seeds": [1], "run": {}, "points": {"a": point}}))
    with pytest.raises(ConfigError, match=r"did you mean 'run'(.|\n)*90|90(.|\n)*did you mean 'run'"):
        families.Family.load(path)
    path.write_text(dump_text({"shares": "text", "seeds": [1], "run": {}, "points": {"a/b": {"minutes": 1}}}))
    with pytest.raises(ConfigError, match="'a/b' cannot name a point"):
        families.Family.load(path)
    for point, problem in (
        ({"clusters": 2}, "Set shares to tokenizer"),
        ({"seeds": [2]}, "`seeds` lacks"),
    ):
        points = {"a": {"minutes": 1, **point}}
        path.write_text(dump_text({"shares": "text", "seeds": [1], "run": {}, "points": points}))
        with pytest.raises(ConfigError, match=problem):
            families.Family.load(path)


def test_changes_of_a_point_reach_into_sections_and_replace_lists(load: Any) -> None:
    merged = load("claims.families").merged
    before = {"budget": {"tokens": 5, "seed_share": 0.5}, "averages": [1, 2]}
    assert merged(before, {"budget": {"seed_share": 0}, "averages": [3]}) == {
        "budget": {"tokens": 5, "seed_share": 0},
        "averages": [3],
    }
    assert before["budget"] == {"tokens": 5, "seed_share": 0.5}


def test_units_in_the_json_are_not_measured_again(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_claims, measured = load("run_claims"), []
    monkeypatch.setattr(run_claims, "RESULTS", tmp_path / "claims")
    monkeypatch.setattr(run_claims.write_docs, "main", lambda: None)
    monkeypatch.setattr(
        run_claims.Place, "measure", lambda place, unit: measured.append(unit.name) or {"perplexity": {}}
    )
    write_family(tmp_path, "seed-share", curve_units({"0.5": {"dense": 9.0}}, seeds=(1,)))
    arguments = ["seed-share", "--corpora", str(tmp_path), "--runs", str(tmp_path / "runs"), "--units", "*/seed-1"]
    run_claims.main(arguments)
    assert measured == ["0/seed-1", "0.25/seed-1", "0.75/seed-1", "1/seed-1"]
    units = json.loads((tmp_path / "claims" / "seed-share.json").read_text())["units"]
    assert set(units) == {"0.5/seed-1", *measured}
    run_claims.main(arguments)
    assert len(measured) == 4
    capsys.readouterr()
    run_claims.main(["seed-share", "--list"])
    listed = capsys.readouterr().out
    assert "measured in 1.0 min" in listed
    assert "about 8 min" in listed


def test_without_text_or_with_an_unknown_name_nothing_is_trained(load: Any) -> None:
    with pytest.raises(SystemExit, match="needs text: --corpora"):
        load("run_claims").main(["seed-share"])
    with pytest.raises(SystemExit, match="no family 'seedshare'"):
        load("run_claims").main(["seedshare"])


def test_figures_of_a_run_are_those_of_the_familys_domains(load: Any) -> None:
    perplexity = {"math": 8.0, "code": 4.0, "cluster0": 2.0}
    methods = {name: {"perplexity": perplexity, "bits_per_byte": perplexity} for name in ("dense", "expert:cluster0")}
    for name in DOMAINS:
        methods[f"expert:{name}"] = {"perplexity": {**perplexity, name: 1.0}, "bits_per_byte": perplexity}
    results = Results(
        name="run",
        random_seed=1,
        domains={name: {"novel": False, "tokens": 1, "bytes": 1} for name in perplexity},
        methods=methods,
        compute={"dense": {"tokens": 5, "flops": 7.0}},
    )
    found = load("claims.training").figures(results, DOMAINS)
    assert set(found["perplexity"]) == {"dense", "expert:math", "expert:code", "own"}
    assert found["perplexity"]["dense"] == {"math": 8.0, "code": 4.0}
    assert found["perplexity"]["own"] == {"math": 1.0, "code": 1.0}
    assert found["bytes"] == {"math": 1, "code": 1}
    assert found["compute"] == {"dense": {"tokens": 5, "flops": 7.0}}


@pytest.fixture
def place(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The family `domains`, whose commands are recorded; `discover` writes two clusters."""
    training, commands = load("claims.training"), []

    def btm(verb: str, *arguments: object) -> None:
        commands.append(verb)
        if verb == "discover":
            out = Path(str(arguments[-1]))
            out.mkdir(exist_ok=True)
            domain = {"text": "cluster0.jsonl.gz", "split_by": {"field": "source"}}
            (out / "domains.yaml").write_text(dump_text({"domains": {"cluster0": domain}}))

    monkeypatch.setattr(training, "_btm", btm)
    for name in DOMAINS:
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(60)))
    families = load("claims.families")
    run = {"domains": {name: {"text": f"{name}.jsonl"} for name in DOMAINS}}
    points = {"2": {"clusters": 2, "minutes": 1}}
    settings = {"shares": "tokenizer", "seeds": [3], "run": run, "points": points}
    family = families.Family("domains", families.FamilyConfig.model_validate(settings))
    return SimpleNamespace(of=training.Place(family, tmp_path, tmp_path), commands=commands)


def test_clusters_are_made_of_training_text_and_the_given_domains_are_evaluated(
    load: Any, monkeypatch: pytest.MonkeyPatch, place: Any, tmp_path: Path
) -> None:
    monkeypatch.setattr(load("claims.training"), "require_usual_splits", lambda config, run: None)
    unit = load("claims.families").Unit("domains", "2", 3, 1.0)
    config = RunConfig.load(place.of.config(unit))
    assert set(place.commands) == {"prepare", "discover"}
    assert {path.name for path in (tmp_path / "train").iterdir()} == {f"{name}.jsonl.gz" for name in DOMAINS}
    assert list(config.domains) == ["cluster0"]
    assert config.domains["cluster0"].text == (str(tmp_path / "clusters-2" / "cluster0.jsonl.gz"),)
    assert list(config.novel_domains) == list(DOMAINS)
    assert config.tokenizer.path == tmp_path / "text" / "tokenizer"
    assert config.random_seed == 3


def test_training_text_has_every_document_of_the_train_split_and_no_other(load: Any, tmp_path: Path) -> None:
    documents = [{"text": f"document {number}", "source": f"book {number % 40}"} for number in range(400)]
    (tmp_path / "math.jsonl").write_text("".join(json.dumps(one) + "\n" for one in documents))
    domain = {"text": "math.jsonl", "split_by": {"field": "source"}}
    values = {"domains": {"math": domain}, "data": {"dev": 0.2, "test": 0.2}}
    (tmp_path / "run.yaml").write_text(dump_text(values))
    config, write = RunConfig.load(tmp_path / "run.yaml"), load("claims.training_text").write_training_text
    with gzip.open(write(config, tmp_path / "train")["math"], "rt") as file:
        written = {json.loads(line)["text"] for line in file}
    held_out = [one for one in documents if one["text"] not in written]
    assert 0 < len(held_out) < len(documents)
    books = {one["source"] for one in held_out}
    assert books.isdisjoint(one["source"] for one in documents if one["text"] in written)
    before = (tmp_path / "train" / "math.jsonl.gz").read_bytes()
    (tmp_path / "train" / "math.jsonl.gz").unlink()
    (tmp_path / "train").rmdir()
    write(config, tmp_path / "train")
    assert (tmp_path / "train" / "math.jsonl.gz").read_bytes() == before


def test_clusters_of_domains_whose_splits_were_moved_are_refused(
    load: Any, monkeypatch: pytest.MonkeyPatch, place: Any, tmp_path: Path
) -> None:
    training, placements = load("claims.training"), dict.fromkeys(DOMAINS, "")
    found = staticmethod(lambda run, name: SimpleNamespace(placement=placements[name]))
    monkeypatch.setattr(training.Fingerprint, "of_domain", found)
    config = SimpleNamespace(domains=placements)
    training.require_usual_splits(config, RunDir(tmp_path))
    placements["math"] = "moved"
    with pytest.raises(SystemExit, match="the splits of math were moved"):
        training.require_usual_splits(config, RunDir(tmp_path))


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
    write_family(tmp_path, "tuning", curve_units(points, seeds=(1,)))
    assert list(figures_of(load, tmp_path, "comparisons", "tuning").values()) == [0.8, 1.0, 1.25]
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
