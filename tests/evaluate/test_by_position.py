"""Perplexity by position in the sequence."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from btm_scale.config.run import RunConfig
from btm_scale.evaluate.by_position import as_result, perplexities, range_ends, ranges_of
from btm_scale.evaluate.evaluate import evaluate
from btm_scale.evaluate.results import load_results
from btm_scale.run_dir import RunDir


def test_ranges_double_up_to_the_length_of_a_sequence() -> None:
    assert range_ends(64) == (64,)
    assert range_ends(128) == (128,)
    assert range_ends(1000) == (128, 256, 512, 1000)
    assert range_ends(1024) == (128, 256, 512, 1024)


def test_a_target_is_in_the_range_of_its_position_in_its_block() -> None:
    ranges = ranges_of(np.array([0, 5, 8]), 10, [2, 4, 5])
    assert ranges.tolist() == [0, 0, 1, 1, 2, 0, 0, 1, 0, 0]


def test_perplexities_are_those_of_the_targets_in_each_range() -> None:
    log_probs = np.log([0.5, 0.25, 0.125, 0.5])
    first, second, absent = perplexities(log_probs, np.array([0, 1, 1, 0]), 3)
    assert first == pytest.approx(2)
    assert second == pytest.approx(math.sqrt(4 * 8))
    assert absent is None
    assert perplexities(np.array([-1000.0]), np.array([0]), 1) == (None,), "no float holds it"


def test_results_have_them_for_every_method_and_domain(
    finished_run: tuple[RunConfig, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, original = finished_run
    run = RunDir(tmp_path / "run")
    shutil.copytree(original.root, run.root)
    assert config.budget.sequence_length <= 128
    assert "positions" not in json.loads(original.results.read_text())
    monkeypatch.setattr("btm_scale.evaluate.by_position._FIRST", 16)
    evaluate(config, run)
    results = load_results(run)
    assert results.positions is not None
    assert results.positions.ends == range_ends(config.budget.sequence_length)
    assert results.positions.perplexity.keys() == results.methods.keys()
    for method, by_domain in results.positions.perplexity.items():
        for domain, values in by_domain.items():
            known = [value for value in values if value is not None]
            assert min(known) <= results.methods[method].perplexity[domain] <= max(known)


def test_sequences_of_one_range_have_no_positions() -> None:
    assert as_result([64], {"prose": {"seed": (3.0,)}}) is None
