"""What `btm-scale mixture` has measured is measured once, whatever happens to the run afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.handmade_run import DOMAINS
from helpers.in_process import answer
from helpers.mixtures import MeasuredHere

from btm_scale.evaluate.mixture_record import MixtureRecord
from btm_scale.evaluate.mixture_runs import default_runs
from btm_scale.forest.expert import CARD, read_expert
from btm_scale.run_dir import SEED, RunDir

MODELS = [*sorted(DOMAINS), SEED]


def renamed(run: RunDir, former: str, name: str) -> None:
    run.model(former).rename(run.model(name))
    read_expert(run.model(name)).model_copy(update={"name": name}).save(run.model(name) / CARD)


def test_only_what_is_missing_is_measured(run: RunDir, here: MeasuredHere, tmp_path: Path) -> None:
    def calls(*words: object) -> int:
        here.calls.clear()
        answer("mixture", run.root, *words)
        return len(here.calls)

    assert calls("--runs", 8) == 8
    first = run.mixture.read_bytes()
    assert calls("--runs", 8) == 0
    assert run.mixture.read_bytes() == first
    assert calls("--runs", 8, "--target", "python=3,cpp=1") == 0
    assert calls("--runs", 10) == 2
    assert calls("--runs", 10, "--random-seed", 1) == 4
    (tmp_path / "mine.txt").write_text("a text of mine")
    assert calls("--runs", 8, "--text", tmp_path / "mine.txt", "--keep", "docs=1.5") == 8
    assert all(texts == ["mine.txt"] for _, texts in here.calls)


def test_a_new_expert_keeps_what_was_measured_without_it(run: RunDir, here: MeasuredHere) -> None:
    answer("mixture", run.root, "--runs", 8)
    shutil.copytree(run.model("cpp"), run.model("rust"))
    card = read_expert(run.model("cpp")).model_copy(update={"name": "rust", "content_hash": "other"})
    card.save(run.model("rust") / CARD)
    here.calls.clear()
    found = answer("mixture", run.root, "--runs", 9)
    assert len(here.calls) == 9 - len(MODELS)  # each of the former models alone is known
    assert len(found["measured"]) == 9 - len(MODELS) + 8
    card.model_copy(update={"content_hash": "trained again"}).save(run.model("rust") / CARD)
    here.calls.clear()
    answer("mixture", run.root, "--runs", 9)
    assert all("rust" in weights for weights, _ in here.calls)
    assert len(here.calls) == 4  # alone, the uniform average and two draws


def test_an_expert_with_another_name_keeps_what_was_measured_of_it(run: RunDir, here: MeasuredHere) -> None:
    first = answer("mixture", run.root, "--target", "docs=1")
    renamed(run, "cpp", "cplusplus")
    here.calls.clear()
    found = answer("mixture", run.root, "--target", "docs=1")
    assert here.calls == []
    assert found["weights"] == {name.replace("cpp", "cplusplus"): weight for name, weight in first["weights"].items()}


def test_models_of_the_same_weights_are_measured_once_and_both_mixed(run: RunDir, here: MeasuredHere) -> None:
    shutil.copytree(run.model(SEED), run.model("aaa"))
    read_expert(run.model(SEED)).model_copy(update={"name": "aaa"}).save(run.model("aaa") / CARD)
    runs = default_runs(len(MODELS) + 1)
    assert answer("mixture", run.root, "--dry-run")["to_measure"] == runs - 1
    found = answer("mixture", run.root)
    assert len(here.calls) == runs - 1, "each alone is the same average"
    assert len(found["measured"]) == runs
    assert {"aaa", SEED} <= {name for one in found["measured"] for name in one["weights"]}
    assert [one["weights"] for one in found["measured"]].count({"aaa": 1.0}) == 1
    assert answer("mixture", run.root) == found
    assert len(here.calls) == runs - 1


def test_an_interrupted_command_resumes_to_the_same_file(run: RunDir, here: MeasuredHere, tmp_path: Path) -> None:
    undisturbed = RunDir(tmp_path / "other")
    shutil.copytree(run.root, undisturbed.root)
    answer("mixture", undisturbed.root, "--runs", 9)
    here.calls.clear()
    here.fails_at = 5
    with pytest.raises(AssertionError, match="exited with"):
        answer("mixture", run.root, "--runs", 9)
    assert len(MixtureRecord.load(run.mixture).measured) == 5
    here.fails_at = None
    answer("mixture", run.root, "--runs", 9)
    assert len(here.calls) == 9
    assert run.mixture.read_bytes() == undisturbed.mixture.read_bytes()
