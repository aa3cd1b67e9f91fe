"""benchmarks/mixtures.py and benchmarks/ensembles.py: what their tables say; no family looks at a later token."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers.tiny_run import tiny_values, write_config

from btm_scale.config.run import RunConfig
from btm_scale.run_dir import RunDir

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ENVIRONMENT = {"hardware": {"cpu": "a CPU", "cores": 2}, "date": "2026-11-27T00:00:00"}
DOMAINS = ("python", "cpp", "licences", "docs")


@pytest.fixture
def table(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setattr(load("doc_tables"), "RESULTS", tmp_path)

    def rows(module: str, name: str, content: dict[str, Any]) -> dict[str, list[str]]:
        (tmp_path / f"{name}.json").write_text(json.dumps({**content, "environment": ENVIRONMENT}))
        lines = [line.strip("| ").split(" | ") for line in load(module).TABLES[name]().splitlines() if "|" in line]
        return {label: cells for label, *cells in lines}

    return rows


def test_without_results_the_tables_say_how_to_take_them(
    load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(load("doc_tables"), "RESULTS", tmp_path)
    for module, name in (("doc_ensembles", "ensembles"), ("doc_mixtures", "mixtures")):
        said = load(module).TABLES[name]()
        assert said == f"Not measured yet: `python benchmarks/{name}.py` takes the measurements."


def text(load: Any, blocks: int, seed: int) -> Any:
    random, length = np.random.default_rng(seed), 32
    tokens = blocks * length
    log_probs = -random.gamma(1.0, 2.0, tokens) * random.uniform(0.9, 1.1, (3, tokens)) - 0.1
    for block, expert in enumerate(random.choice(3, blocks, p=[0.6, 0.3, 0.1])):
        columns = slice(block * length, (block + 1) * length)
        log_probs[expert, columns] *= 0.7
    return load("ensemble_families").Text(log_probs, np.arange(blocks) * length)


def test_no_family_looks_at_the_token_that_it_predicts_or_at_later_ones(load: Any) -> None:
    families = load("ensemble_families").FAMILIES
    dev, given = text(load, 12, 0), text(load, 4, 1)
    changed = given.log_probs.copy()
    changed[0, 40:64] -= 1.0  # tokens of the second block, of one expert
    for name, family in families.items():
        before, after = (family(dev, type(dev)(one, given.block_starts)) for one in (given.log_probs, changed))
        np.testing.assert_array_equal(before[:40], after[:40], err_msg=name)
        np.testing.assert_allclose(before[64:], after[64:], err_msg=name)
        assert (after[40:64] <= before[40:64] + 1e-9)[0], name
        assert (before <= 1e-12).all(), name


def test_every_family_predicts_better_than_equal_weights_where_blocks_have_an_expert(load: Any) -> None:
    dev, given = text(load, 30, 2), text(load, 30, 3)
    equal = float(np.log(np.exp(given.log_probs).mean(axis=0)).mean())
    for name, family in load("ensemble_families").FAMILIES.items():
        assert family(dev, given).mean() > equal, name


def test_every_family_has_a_label_and_a_row_with_a_column_per_seed(load: Any, table: Any) -> None:
    families = load("ensemble_families").FAMILIES
    assert families.keys() == load("doc_ensembles").LABELS.keys()
    measured = {name: {"seconds": 1.0, "perplexity": {"a": 9.0, "b": 18.0}} for name in families}
    run = {"novel": ["b"], "dev_tokens": {"a": 1000, "b": 70}, "dense": {"a": 10.0, "b": 20.0}, "families": measured}
    runs = [run | {"random_seed": 1}, run | {"random_seed": 2}]
    rows = table("doc_ensembles", "ensembles", {"runs": {"demo": runs}})
    assert "1,000 dev tokens per domain (but b 70):" in load("doc_ensembles").ensembles()
    assert rows["weights"] == ["seed 1", "seed 2", "mean ± sd", "novel, seed 1", "novel, seed 2", "mean ± sd"]
    assert set(rows[load("doc_ensembles").LABELS["gate"]]) == {"0.9000", "0.900 ± 0.000"}


def test_the_weights_of_experts_that_replay_have_the_wanted_proportions(load: Any) -> None:
    weights_for = load("mixture_forest").weights_for
    forest = SimpleNamespace(domains=list(DOMAINS))
    names = sorted([*DOMAINS, "seed"])
    ratios = dict(zip(DOMAINS, (0.4, 0.3, 0.2, 0.1), strict=True))
    for replay in (0.0, 0.2):
        weights = dict(zip(names, weights_for(forest, names, ratios, replay).tolist(), strict=True))
        assert sum(weights.values()) == pytest.approx(1.0)
        for name, ratio in ratios.items():
            assert (1 - replay) * weights[name] + replay / 4 == pytest.approx(ratio)
    far = weights_for(forest, names, dict(zip(DOMAINS, (1.0, 0.0, 0.0, 0.0), strict=True)), 0.4)
    assert far.min() == 0.0
    assert far.sum() == pytest.approx(1.0)


@pytest.mark.parametrize(("scales", "second"), [(True, 0.95**0.25), (False, 0.95)])
def test_a_model_of_a_mixture_has_the_betas_of_an_expert(
    scales: bool, second: float, load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    values = tiny_values(tmp_path, optimizer={"lr": 1e-2, "betas": [0.9, 0.95], "scale_beta2": scales})
    values["budget"]["batch_tokens"] = 1024
    config = write_config(tmp_path / "run.yaml", values)
    module, given = load("mixture_forest"), list[str]()
    forest = module.Forest(RunDir(tmp_path), config)
    monkeypatch.setattr(module.Forest, "_branch", lambda self, folder, models, *settings: given.extend(settings))
    monkeypatch.setattr(module, "perplexities", lambda *arguments: {})
    monkeypatch.setattr(RunConfig, "expert_sequences", lambda self, name: self.budget.sequences // 4)
    forest.train_mixture(tmp_path / "out", {"python": 0.5, "licences": 0.5})
    assert f"optimizer.betas=[0.9,{second}]" in given


def test_the_mixtures_were_drawn_from_the_simplex_before_they_are_trained() -> None:
    ratios = json.loads((BENCHMARKS / "mixture_ratios.json").read_text())
    for seed, key in enumerate(("mixtures", "held_out")):
        drawn = np.random.default_rng(seed).dirichlet(np.ones(4), 8)
        np.testing.assert_allclose([[one[name] for name in DOMAINS] for one in ratios[key]], drawn, atol=2e-6)


def test_what_is_not_measured_is_a_dash_and_ranks_are_of_the_trained_mixtures(load: Any, table: Any) -> None:
    predicted = [{"a": 30.0 + i, "b": 10.0} for i in range(8)]
    forest = {"r2": {"a": 0.99, "b": 0.98}, "uniform": 40.0, "own": {"a": 20.0, "b": 30.0}}
    forest |= {"predicted": predicted, "averages": predicted[::-1]}
    units = {"demo-1/predicted": forest, "demo-2/predicted": forest}
    units |= {f"demo-1/trained-{i}": {"perplexity": {"a": 20.0 + i**2, "b": 5.0}} for i in range(5)}
    units |= {
        "demo-1/recommended": {"perplexity": {"a": 9.0, "b": 9.0}},
        "demo-1/uniform": {"perplexity": {"a": 10.0, "b": 10.0}},
    }
    rows = table("doc_mixtures", "mixtures", {"units": units})
    assert rows["no replay: Spearman, trained models predicted"] == ["1.000", "-"]
    assert rows["no replay: Spearman, averages, by the law fitted to them"] == ["-1.000", "-"]
    assert rows["no replay: lowest R2 of a domain's law"] == ["0.980", "0.980"]
    assert rows["recommended / uniform, trained"] == ["0.900", "-"]
    assert rows["recommended / proportional, trained"] == ["-", "-"]
    assert rows["replay 0.1: Spearman, averages, by the law fitted to them"] == ["-", "-"]
    assert load("doc_mixtures").spearman(np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])) == pytest.approx(-1.0)


def test_the_committed_predictions_rank_trained_mixtures_and_what_they_recommend_is_as_good_as_any(load: Any) -> None:
    module = load("doc_mixtures")
    units = json.loads((BENCHMARKS / "results/mixtures.json").read_text())["units"]
    better = 0
    for forest in ("demo-1", "demo-2", "demo-3", "demo-4"):
        assert min(units[f"{forest}/predicted"]["r2"].values()) >= 0.98
        correlation = module.rank_correlation(units, forest, "predicted")
        assert correlation is not None
        assert correlation >= 0.8
        better += all(module._ratio(units, forest, other) <= 1.005 for other in ("uniform", "proportional"))
    assert better >= 2
