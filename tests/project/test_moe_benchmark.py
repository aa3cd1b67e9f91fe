"""benchmarks/moe.py: units are written as they end, and the tables of docs/moe.md need only those that are measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ENVIRONMENT = {"hardware": {"cpu": "a CPU", "cores": 2}, "date": "2026-11-27T00:00:00"}
SEED = {"math": 64.0, "code": 16.0}


def scaled(factor: float) -> dict[str, float]:
    return {name: factor * value for name, value in SEED.items()}


def unit(**methods: float) -> dict[str, Any]:
    return {"seconds": 1, "perplexity": {name.replace("_", "-"): scaled(factor) for name, factor in methods.items()}}


@pytest.fixture
def table(load: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A table of docs/moe.md as rows of cells, from some units."""
    monkeypatch.setattr(load("doc_tables"), "RESULTS", tmp_path)

    def rows(name: str, units: dict[str, Any]) -> dict[str, list[str]]:
        (tmp_path / "moe.json").write_text(json.dumps({"units": units, "environment": ENVIRONMENT}))
        lines = [line.strip("| ").split(" | ") for line in load("doc_moe").TABLES[name]().splitlines() if "|" in line]
        return {label: cells for label, *cells in lines}

    return rows


def test_without_results_every_table_says_how_to_take_them(load, monkeypatch, tmp_path):
    monkeypatch.setattr(load("doc_tables"), "RESULTS", tmp_path)
    for one in load("doc_moe").TABLES.values():
        assert one() == "Not measured yet: `python benchmarks/moe.py` takes the measurements."


def test_a_router_that_is_not_measured_is_a_dash_and_the_fitted_one_is_compared_with_the_best_other(table):
    units = {"demo-1/router-fitted": unit(moe=0.5), "demo-2/router-fitted": unit(moe=0.5)}
    units |= {"demo-1/router-hidden": unit(moe=0.55), "demo-1/router-random": unit(moe=0.75)}
    rows = table("moe_routers", units)
    assert rows["router"] == ["demo-1", "demo-2"]
    assert rows["`fitted`"] == ["20.00", "20.00"]
    assert rows["`hidden`"] == ["22.00", "-"]
    assert rows["**best of `embedding`, `hidden`, `random` / `fitted`**"] == ["1.100", "-"]


def test_recipes_are_relative_to_dense_and_mlp_experts_have_the_gain_that_the_mixture_keeps(table):
    units = {
        "demo-1/forest": unit(seed=1.0, dense=0.8, ensemble=0.4),
        "demo-1/joint-0.1": unit(moe=0.6),
        "demo-1/dense": {"perplexity": {"dense-1.1x": scaled(0.72)}},
        "demo-1/mlps": unit(seed=1.0, own=0.25, moe=0.5),
    }
    rows = table("moe_recipes", units)
    assert rows["`ensemble`"] == ["0.500"]
    assert rows["`moe`, router `fitted-routed`, 10% more tokens"] == ["0.750"]
    assert rows["dense, 10% more tokens"] == ["0.900"]
    assert rows["`moe`, router `fitted-routed`, 20% more tokens"] == ["-"]
    assert rows["**MLPs alone: gain over the seed LM that `moe` keeps, router `fitted`**"] == ["0.50"]


def test_upcycling_has_a_row_for_each_recipe(table, load):
    one = {"bytes_written": 4.9e9, "anonymous_bytes": 2**28, "seconds": 9.0}
    upcycle = dict.fromkeys(load("doc_moe")._UPCYCLED, one)
    upcycle |= {"bytes_per_model": 1.07e9, "environment": ENVIRONMENT}
    upcycle |= {"copy_seconds": 7.5, "hashed_copy_seconds": 6.0, "direct_copy_seconds": 4.5}
    rows, cores = table("moe_upcycling", {"upcycle": upcycle}), ENVIRONMENT["hardware"]["cores"]
    for label in load("doc_moe")._UPCYCLED.values():
        assert rows[label] == ["9.0 s", "1.20", "1.50", "2.00", "0.25 GiB"]
    assert rows["a copy, by one process"] == ["7.5 s", "1.00", "1.25", "1.67", "-"]
    assert rows[f"a copy that is hashed, by {cores} processes"] == ["6.0 s", "0.80", "1.00", "1.33", "-"]
    assert rows[f"a copy directly to the disk, by {cores} threads"] == ["4.5 s", "0.60", "0.75", "1.00", "-"]


def test_a_table_says_when_its_own_units_were_measured(load, monkeypatch, tmp_path):
    monkeypatch.setattr(load("doc_tables"), "RESULTS", tmp_path)
    days = {"demo-1/router-fitted": "27", "demo-2/router-random": "28", "demo-1/forest": "26", "upcycle": "30"}
    units = {
        name: unit(moe=0.5, dense=0.5) | {"environment": ENVIRONMENT | {"date": f"2026-11-{day}T10:00:00+00:00"}}
        for name, day in days.items()
    }
    (tmp_path / "moe.json").write_text(json.dumps({"units": units, "environment": ENVIRONMENT}))
    tables = load("doc_moe").TABLES
    assert tables["moe_routers"]().endswith(" cores, 2026-11-27 to 2026-11-28.")
    assert tables["moe_recipes"]().endswith(" cores, 2026-11-26 to 2026-11-28.")


def test_every_row_of_the_recipes_is_a_unit_of_the_benchmark(load, tmp_path):
    options = load("argparse").Namespace(smoke=False, out=tmp_path, corpora=None)
    units = set(load("moe").all_units(options))
    assert {f"demo-1/{recipe}" for _, recipe, _ in load("doc_moe")._rows()} <= units
    assert {"eight-1/joint-0.1", "eight-1/dense"} <= units
    assert all(load("moe").minutes(name) > 0 for name in units)


def test_a_unit_comes_after_its_forest_and_a_pattern_without_a_unit_is_refused(load, tmp_path):
    moe = load("moe")
    known = moe.all_units(load("argparse").Namespace(smoke=False, out=tmp_path, corpora=None))
    assert moe.chosen(["demo-2/joint-*", "upcycle"], known) == [
        *("demo-2/forest", "demo-2/joint-0.1", "demo-2/joint-0.2", "demo-2/joint-0.05", "demo-2/joint-0.4"),
        "upcycle",
    ]
    with pytest.raises(SystemExit, match="'demo-9/\\*' matches no unit"):
        moe.chosen(["demo-9/*"], known)


def test_a_unit_is_written_as_it_ends_and_not_measured_again(load, tmp_path):
    measure, calls, result = load("units").measure, [], tmp_path / "results" / "moe.json"

    def taking(name: str) -> Any:
        def one() -> dict[str, Any]:
            calls.append(name)
            if calls == ["a", "b"]:
                raise KeyboardInterrupt
            return {"figure": name}

        return one

    known = {name: taking(name) for name in ("a", "b")}
    with pytest.raises(KeyboardInterrupt):
        measure(list(known), known, result)
    assert json.loads(result.read_text())["units"].keys() == {"a"}
    measure(list(known), known, result)
    assert calls == ["a", "b", "b"]
    assert json.loads(result.read_text())["units"]["b"]["figure"] == "b"
    assert [path.name for path in result.parent.iterdir()] == ["moe.json"]
