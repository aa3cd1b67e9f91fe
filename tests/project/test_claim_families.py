"""benchmarks/claims: families of runs, their units and the text that they train on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.claim_units import DOMAINS, curve_units, write_family

from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.configs import FOLDER
from btm_scale.errors import ConfigError
from btm_scale.evaluate.results import Results
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import model_names, training_job


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
