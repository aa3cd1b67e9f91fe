"""`btm-scale mixture`: which averages are measured, once each, and which mixture is chosen from them."""

from __future__ import annotations

import json
import logging
import math
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.handmade_run import DOMAINS
from helpers.in_process import answer, refusal
from helpers.mixtures import FakeText, MeasuredHere, chosen_mixture, known_loss, measured_mixtures
from transformers import AutoModelForCausalLM

from btm_scale.cli.app import main
from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import load_yaml
from btm_scale.evaluate.ablate import file_text
from btm_scale.evaluate.mixture_choice import MixtureGoal, choose
from btm_scale.evaluate.mixture_law import LAWS, needed
from btm_scale.evaluate.mixture_record import MeasuredMixture, MixtureRecord
from btm_scale.evaluate.mixture_runs import components, default_runs, drawn, measure
from btm_scale.forest.expert import CARD, read_expert
from btm_scale.report.mixture_table import domains_yaml, trust
from btm_scale.run_dir import SEED, RunDir

MODELS = [*sorted(DOMAINS), SEED]


def test_an_average_is_weighted_and_has_the_seed_as_a_part(
    handmade: tuple[RunConfig, RunDir], run: RunDir, tmp_path: Path
) -> None:
    (tmp_path / "sample.txt").write_text("def merge(one, other):\n    return one + other\n")
    text = file_text(handmade[0], run, tmp_path / "sample.txt")
    weights = {"python": 0.75, SEED: 0.25}
    [measured] = measure(run, {"sample": text}, [weights])
    expert, seed = (AutoModelForCausalLM.from_pretrained(run.model(name)) for name in ("python", SEED))
    with torch.no_grad():
        for name, parameter in expert.named_parameters():
            parameter.copy_(0.75 * parameter + 0.25 * seed.get_parameter(name))
        tokens = torch.tensor(text.tokens[None])
        log_probs = expert(tokens[:, :-1]).logits[0].log_softmax(-1).gather(1, tokens[0, 1:, None])
    assert len(text.block_starts) == 1
    assert measured.losses[text.fingerprint] == pytest.approx(-float(log_probs.mean()), rel=1e-4)
    assert not list(run.root.glob(".ablation*"))


def test_the_answer_has_weights_perplexities_and_the_fit(run: RunDir, here: MeasuredHere) -> None:
    found = answer("mixture", run.root)
    assert len(here.calls) == len(found["measured"]) == 24
    assert [one["mean"] for one in found["measured"]] == sorted(one["mean"] for one in found["measured"])
    assert list(found["weights"]) == sorted(MODELS)
    assert sum(found["weights"].values()) == pytest.approx(1.0)
    # By symmetry all experts weigh the same, and training needs none of the seed's text.
    assert found["weights"][SEED] == 0.0
    weights = [found["weights"][name] for name in DOMAINS]
    assert weights == pytest.approx([weights[0]] * 4, abs=2e-3)
    for domain in DOMAINS:
        perplexity, fit = found["perplexity"][domain], found["fit"][domain]
        assert fit["law"] == "quadratic"
        assert fit["r2"] == pytest.approx(1.0)
        assert perplexity["predicted"] == pytest.approx(math.exp(known_loss(found["weights"], domain)), rel=1e-4)
        low, high = perplexity["interval"]
        assert low <= perplexity["predicted"] <= high
        assert perplexity["seed"] == pytest.approx(math.exp(known_loss({SEED: 1.0}, domain)))
        assert perplexity["trained"] <= perplexity["predicted"] * (1 + 1e-6)
    assert found["mean"]["trained"] <= found["mean"]["trained_uniform"]
    # The seed was trained on all four domains alike.
    text = {name: one["weight"] for name, one in found["domains"].items()}
    assert sum(text.values()) == pytest.approx(1.0)
    assert text["cpp"] == pytest.approx(found["weights"]["cpp"] + found["weights"][SEED] / 4)
    assert found["outside"] == {}
    assert found["unreplayed"] == []


def test_what_is_printed_has_the_section_to_paste(
    run: RunDir, here: MeasuredHere, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["mixture", str(run.root), "--target", "python=2,cpp=1", "--keep", "docs=1.02"])
    shown = capsys.readouterr()
    assert "24 of 24 averages to measure" in shown.err
    assert "24 of 24 averages measured" in shown.err
    assert "quadratic" in shown.out
    section = shown.out[shown.out.index("\ndomains:") :]
    (tmp_path / "pasted.yaml").write_text(section)
    pasted = load_yaml(tmp_path / "pasted.yaml")["domains"]
    assert pasted["python"]["weight"] > pasted["cpp"]["weight"] > 0
    chosen = MixtureRecord.load(run.mixture).chosen
    assert chosen is not None
    assert section.strip() == domains_yaml(chosen).strip()


def test_a_dry_run_measures_and_writes_nothing(run: RunDir, here: MeasuredHere) -> None:
    before = sorted(run.root.rglob("*"))
    cost = answer("mixture", run.root, "--runs", 9, "--dry-run")
    assert (cost["runs"], cost["to_measure"]) == (9, 9)
    assert cost["tokens"] > 0
    assert cost["disk_bytes"] >= (run.model("cpp") / "model.safetensors").stat().st_size
    assert cost["seconds"] is None  # nothing is known of how fast these models were trained
    assert here.calls == []
    assert sorted(run.root.rglob("*")) == before


def test_the_time_is_that_of_forward_passes_at_the_speed_of_training_on_this_device(
    run: RunDir, here: MeasuredHere
) -> None:
    for name, device in (("cpp", f"CPU ({platform.machine()})"), ("docs", "another device")):
        row = {"step": 1, "loss": 2.0, "tokens_per_second": 500.0 if name == "cpp" else 1e9, "device": device}
        run.metrics(name).parent.mkdir(parents=True, exist_ok=True)
        run.metrics(name).write_text(json.dumps(row) + "\n")
    cost = answer("mixture", run.root, "--runs", 9, "--dry-run", "--device", "cpu")
    assert cost["seconds"] == pytest.approx(cost["tokens"] / (3 * 500.0))


def test_the_order_of_models_and_measurements_changes_nothing() -> None:
    names = ["a", "b", "c", "seed"]
    texts: Any = {name: FakeText(name) for name in ("a", "b", "c")}
    measured = measured_mixtures(names, list(texts), 20)
    goal = MixtureGoal({"a": 1.0, "b": 2.0}, {"c": 1.0})
    found = choose(measured, texts, names, goal)
    assert found == choose(measured[::-1], texts, names[::-1], goal)
    assert drawn(names, 20) == drawn(names[::-1], 20)
    assert drawn(names, 20) == drawn(names, 30)[:20]
    assert drawn(names, 20) != drawn(names, 20, random_seed=1)
    assert all(sum(mixture.values()) == pytest.approx(1.0) for mixture in drawn(names, 30))


@pytest.mark.parametrize(
    ("huge", "usual"),
    [
        ({"math": 1e308, "code": 1e308}, {"math": 1.0, "code": 1.0}),
        ({"math": 1.7e308, "code": 1e308}, {"math": 1.7, "code": 1.0}),
        ({"math": 1e300, "code": 1e-300}, {"math": 1.0}),
    ],
)
def test_targets_of_any_size_are_proportions(huge: dict[str, float], usual: dict[str, float]) -> None:
    names = ["math", "code", "seed"]
    texts: Any = {name: FakeText(name) for name in ("math", "code")}
    measured = measured_mixtures(names, list(texts), 24)
    found, expected = (choose(measured, texts, names, MixtureGoal(targets, {})) for targets in (huge, usual))
    assert found.weights == pytest.approx(expected.weights, abs=1e-9)
    assert found.mean.predicted == pytest.approx(expected.mean.predicted)


def test_what_must_be_kept_is_kept() -> None:
    free = chosen_mixture(["a", "b", "seed"], keep={"general": 10.0})
    kept = chosen_mixture(["a", "b", "seed"], keep={"general": 0.73})
    reference = math.exp(known_loss({SEED: 1.0}, "general"))
    assert free.perplexity["general"].predicted > 0.75 * reference
    assert kept.perplexity["general"].predicted <= 0.73 * reference * (1 + 1e-6)
    assert kept.mean.predicted > free.mean.predicted


def test_a_diverged_average_is_left_out_with_a_warning(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def diverges(weights: Mapping[str, float], text: str) -> float:
        return math.nan if weights == {"cpp": 1.0} else known_loss(weights, text)

    MeasuredHere(monkeypatch, diverges)
    text: Any = FakeText("fingerprint")
    with caplog.at_level(logging.WARNING):
        measured = measure(run, {"docs": text}, drawn(components(run), 12))
    assert "the average with weights {'cpp': 1.0} diverged" in caplog.text
    assert len(measured) == 11
    assert len(MixtureRecord.load(run.mixture).measured) == 11


@pytest.mark.parametrize("name", ["docs", SEED])
def test_a_model_that_diverged_is_named_after_it_was_measured_alone(
    name: str, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = MeasuredHere(monkeypatch, lambda weights, text: math.nan if name in weights else known_loss(weights, text))
    said = refusal("mixture", run.root)
    assert f"'{name}' has diverged" in said
    assert ("Train it again" if name == SEED else f"btm-scale forest remove {run.root} docs") in said
    assert here.calls[-1][0] == {name: 1.0}


def test_a_run_without_a_seed_mixes_its_experts(run: RunDir, here: MeasuredHere) -> None:
    shutil.rmtree(run.model(SEED))
    found = answer("mixture", run.root, "--runs", 16)
    assert list(found["weights"]) == sorted(DOMAINS)
    assert found["perplexity"]["cpp"]["seed"] is None
    assert found["perplexity"]["cpp"]["trained"] is None
    assert found["unreplayed"] == sorted(DOMAINS)
    assert "this run has none. Leave --keep out" in refusal("mixture", run.root, "--keep", "docs=1.1")
    for name in ("cpp", "docs", "licences"):
        shutil.rmtree(run.model(name))
    assert "'python' is the only model" in refusal("mixture", run.root)


def test_a_model_of_unknown_text_is_not_in_the_section_to_paste(run: RunDir, here: MeasuredHere) -> None:
    card = read_expert(run.model("docs"))
    card.model_copy(update={"domains": {}}).save(run.model("docs") / CARD)
    found = answer("mixture", run.root)
    assert list(found["outside"]) == ["docs"]
    assert found["outside"]["docs"] + sum(one["weight"] for one in found["domains"].values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--target", "law=2"), "Unknown domain 'law'. Choose one of python, cpp"),
        (("--keep", "general=1.02"), "Unknown domain 'general'"),
        (("--target", "python"), "--target python: expected NAME=NUMBER, or several, such as law=2,python=1"),
        (("--target", "python=1,python=2"), "--target names 'python' twice"),
        (("--target", "python=0"), "--target python=0: the number must be positive and finite"),
        (("--keep", "docs=nan"), "--keep docs=nan: the number must be positive and finite"),
        (("--target", "python=1", "--text", __file__), "--target and --text exclude each other"),
        (("--runs", "5"), "5 runs are too few for 5 models"),
        (("--keep", "python=0.01"), "No mixture is predicted to meet --keep python=0.01"),
        (("--text", "/absent.txt"), "/absent.txt cannot be read"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_refused_with_what_would_be_right(
    words: tuple[str, ...], message: str, run: RunDir, here: MeasuredHere
) -> None:
    said = refusal("mixture", run.root, *words)
    assert message in said
    if "No mixture" not in message:
        assert here.calls == []


def test_too_few_runs_are_refused_with_what_each_law_needs(run: RunDir) -> None:
    said = refusal("mixture", run.root, "--runs", 5)
    assert "the linear law 6, the exponential law 7, the quadratic law 16. Set --runs to 6 or more." in said
    assert components(run) == [*sorted(DOMAINS), SEED]


def test_the_default_number_of_averages_grows_with_the_parameters_of_the_laws() -> None:
    quadratic = LAWS[-1]
    assert [default_runs(models) for models in (2, 5)] == [24, 24]
    for models in range(2, 13):
        names = [f"m{number}" for number in range(models)]
        assert default_runs(models) >= needed(quadratic, models) + 2, models
        assert len(drawn(names, default_runs(models))) == default_runs(models)
    assert default_runs(20) == 120
    assert [default_runs(models) >= needed(quadratic, models) for models in (14, 15)] == [True, False]
    assert [default_runs(models) for models in (59, 60)] == [120, 122]
    assert default_runs(64) > needed(LAWS[1], 64)


def test_a_law_that_too_few_averages_leave_out_is_named_with_what_it_needs() -> None:
    names = ["a", "b", "c", "seed"]
    assert not any("too few" in sentence for sentence in trust(chosen_mixture(names)))
    few = trust(chosen_mixture(names, runs=9))
    assert "They are too few averages of 4 models for the quadratic law, which needs 11. Raise --runs." in few


def test_the_distance_to_the_nearest_measured_average_is_reported() -> None:
    found = chosen_mixture()
    distances = [
        0.5 * sum(abs(found.weights[name] - one.weights.get(name, 0.0)) for name in found.weights)
        for one in found.measured
    ]
    assert found.nearest == pytest.approx(min(distances))
    assert found.extrapolated == ()


def test_an_optimum_beyond_what_was_measured_is_reported() -> None:
    draws = 0.2 + 0.4 * np.random.default_rng(0).dirichlet(np.ones(3), 20)
    mixtures = [dict(zip("abc", weights.tolist(), strict=True)) for weights in draws]
    measured = [
        MeasuredMixture(
            key=str(i), weights=mixture, losses={"x": 3.0 - mixture["a"] + 0.3 * mixture["a"] * mixture["b"]}
        )
        for i, mixture in enumerate(mixtures)
    ]
    text: Any = FakeText("x")
    found = choose(measured, {"x": text}, ["a", "b", "c"], MixtureGoal({"x": 1.0}, {}))
    assert found.weights["a"] == pytest.approx(1.0, abs=1e-3)
    assert found.extrapolated == ("x",)
    assert found.nearest > 0.3
    assert found.mean.seed is None
