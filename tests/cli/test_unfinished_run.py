"""Commands on a run that is not finished say what is missing, in one sentence and without a traceback."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from helpers.tiny_run import save_card, tiny_values, write_config
from helpers.warm import Warm

from btm_scale.cli.app import parse
from btm_scale.cli.verb import Call
from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.errors import ForestError
from btm_scale.evaluate.readiness import require_evaluable
from btm_scale.forest.open import open_config
from btm_scale.forest.scores import all_texts
from btm_scale.run.state import open_run
from btm_scale.run_dir import RunDir


@pytest.fixture
def opened(tmp_path: Path) -> tuple[RunConfig, RunDir]:
    """A run that has only its run.yaml."""
    run = RunDir(tmp_path / "run")
    return open_run(write_config(tmp_path / "tiny.yaml", tiny_values(tmp_path)), run), run


def call(*arguments: object) -> int:
    command = parse([str(argument) for argument in arguments])
    assert isinstance(command, Call)
    return command.run()


def pretend_scored(config: RunConfig, run: RunDir, model: str) -> None:
    for domain, split in all_texts(config):
        path = run.scores(model, domain, split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


@pytest.mark.parametrize(
    "command",
    [
        ("evaluate",),
        ("report",),
        ("ablate",),
        ("mixture",),
        ("generate", "--prompt", "x"),
    ],
    ids=lambda command: command[0],
)
def test_a_command_that_needs_experts_says_that_there_are_none(
    command: tuple[str, ...], opened: tuple[RunConfig, RunDir]
) -> None:
    _, run = opened
    with pytest.raises(ForestError) as raised:
        call(command[0], run.root, *command[1:])
    assert str(raised.value) == f"There is no expert in {run.experts}. Train some first: btm-scale run CONFIG"


def test_evaluate_prints_that_line_alone(opened: tuple[RunConfig, RunDir], warm: Warm) -> None:
    _, run = opened
    done = warm.run("evaluate", run.root)
    assert done.code == 2
    assert done.stderr == f"btm-scale: There is no expert in {run.experts}. Train some first: btm-scale run CONFIG\n"


@pytest.mark.parametrize("action", ["list", "lineage"])
def test_an_empty_forest_is_described_to_a_person_and_is_an_empty_document(
    action: str, opened: tuple[RunConfig, RunDir], capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = opened
    assert call("forest", action, run.root) == 0
    assert capsys.readouterr().out.startswith(f"There is no expert in {run.experts}. Train some first")
    assert call("forest", action, run.root, "--json") == 0
    assert list(json.loads(capsys.readouterr().out).values()) == [{}]


def test_a_branch_from_a_model_that_is_not_trained_is_refused(opened: tuple[RunConfig, RunDir]) -> None:
    _, run = opened
    with pytest.raises(ForestError, match=r"licences cannot branch from 'python', which is not a finished model of"):
        call("branch", run.root, "--name", "licences", "--from", "python")
    for by_score in ("nearest", "posterior"):
        with pytest.raises(ForestError, match=f"licences cannot branch by {by_score}: there is no expert in"):
            call("branch", run.root, "--name", "licences", "--from", by_score)
    assert sorted(path.name for path in run.root.iterdir()) == [".locks", "run.yaml"]


def test_score_says_that_nothing_is_trained_or_that_nothing_lacks_scores(
    opened: tuple[RunConfig, RunDir], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = opened
    with pytest.raises(ForestError, match=r"There is no finished model in .* Train some first: btm-scale run CONFIG"):
        call("score", run.root)
    save_card(run.model("seed"), "seed")
    monkeypatch.setattr("btm_scale.forest.scores.scored", lambda path: ("", 0))
    call("score", run.root)
    assert capsys.readouterr().out == "Nothing to score: every finished model has all scores.\n"


def test_an_evaluation_names_the_models_that_are_not_trained_and_then_those_without_scores(
    opened: tuple[RunConfig, RunDir], caplog: pytest.LogCaptureFixture
) -> None:
    config, run = opened
    save_card(run.model("python"), "python")
    with pytest.raises(ForestError, match=r"^seed, dense, random/0 and random/1 of .* are not trained\. "):
        require_evaluable(config, run)
    for model in ("seed", "dense", "random/0", "random/1"):
        save_card(run.model(model), model)
        pretend_scored(config, run, model)
    with pytest.raises(ForestError, match=r"^python of .* is not scored on every domain\. .*: btm-scale score "):
        require_evaluable(config, run)
    pretend_scored(config, run, "python")
    with caplog.at_level(logging.WARNING):
        require_evaluable(config, run)
    assert "licences is not trained, and the forest is evaluated without" in caplog.text


def test_a_directory_in_place_of_an_action_or_a_config_is_answered_with_what_may_be_meant(
    opened: tuple[RunConfig, RunDir], warm: Warm
) -> None:
    _, run = opened
    for words, meant in (((), "btm-scale status"), (("forest",), "btm-scale forest list")):
        done = warm.run(*words, run.root)
        assert done.code == 2
        assert f"{run.root} is a directory and not a command. Did you mean '{meant} {run.root}'?" in done.stderr
    done = warm.run("run", run.root)
    assert done.stderr == (
        f"btm-scale: {run.root} is a directory. Give its run.yaml, with --out {run.root}, or your own YAML.\n"
    )


def test_training_a_run_that_is_not_prepared_is_refused_in_one_sentence_before_a_launcher_starts(
    opened: tuple[RunConfig, RunDir], warm: Warm, tmp_path: Path
) -> None:
    _, run = opened
    done = warm.run("train", tmp_path / "tiny.yaml", "--out", run.root)
    assert done.code == 2
    assert done.stderr == (
        f"btm-scale: The run in {run.root} is not prepared: it lacks a tokenizer, token files of 'python', token files "
        f"of 'licences' and 1 more domains. Prepare it first: btm-scale prepare CONFIG --out {run.root}. btm-scale run "
        "prepares and trains in one command.\n"
    )
    assert not run.train("").exists()


def test_an_unnamed_run_of_an_earlier_version_is_pointed_out_and_not_resumed_by_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    values = tiny_values(tmp_path)
    values.pop("name", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "run").mkdir(parents=True)
    (tmp_path / "my.yaml").write_text(dump_text(values))
    open_config(Path("my.yaml"))
    assert "earlier version" not in caplog.text
    (tmp_path / "runs" / "run" / "run.yaml").write_text(dump_text(values | {"name": "run"}))
    _, run = open_config(Path("my.yaml"))
    assert run.root == tmp_path / "runs" / "my"
    assert "give --out runs/run" in caplog.text
