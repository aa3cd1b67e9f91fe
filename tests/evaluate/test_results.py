"""Loading results.json."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from btm_scale.config.run import RunConfig
from btm_scale.errors import ForestError
from btm_scale.evaluate.evaluate import evaluate
from btm_scale.evaluate.results import load_results
from btm_scale.run_dir import RunDir


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is a JSON list, and must be an object"),
        ('{"schema": 1, "domains": {', "is not valid JSON"),
        ('{"schema": 1, "name": "", "random_seed": 0, "domains": {}}', "field 'methods' is missing"),
    ],
)
def test_damaged_results_are_an_error_with_the_remedy(tmp_path: Path, text: str, message: str) -> None:
    run = RunDir(tmp_path)
    run.results.parent.mkdir()
    run.results.write_text(text)
    with pytest.raises(ForestError, match=rf"{message}.*\. Run btm-scale evaluate again\."):
        load_results(run)


def test_results_record_whether_the_run_asks_for_the_same_bits_on_gpus(
    finished_run: tuple[RunConfig, RunDir], tmp_path: Path
) -> None:
    config, original = finished_run
    assert not any("deterministic" in note for note in load_results(original).notes)
    run = RunDir(tmp_path / "run")
    shutil.copytree(original.root, run.root)
    evaluate(config.model_copy(update={"health": config.health.model_copy(update={"deterministic": True})}), run)
    assert any(note.startswith("health.deterministic is set") for note in load_results(run).notes)


def test_a_run_without_averages_notes_why(finished_run: tuple[RunConfig, RunDir], tmp_path: Path) -> None:
    config, original = finished_run
    run = RunDir(tmp_path / "run")
    shutil.copytree(original.root, run.root)
    without = config.evaluate.model_copy(update={"averages": ()})
    notes = evaluate(config.model_copy(update={"evaluate": without}), run).notes
    assert "No averages: evaluate.averages is empty." in notes
    assert not any("experts differ" in note for note in notes)
