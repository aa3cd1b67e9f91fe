"""What a killed `forest add` left is removed by the next command; what a living one writes stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.complete_models import complete_weights, write_model
from safetensors.torch import save_file

from btm_scale.checkpoint.formats.kept_hashes import NAME as HASHES
from btm_scale.config.run import RunConfig
from btm_scale.forest import membership
from btm_scale.forest.abandoned import remove_abandoned
from btm_scale.forest.membership import add_expert, adding, remove_expert
from btm_scale.run.grow import remove_from_forest
from btm_scale.run.pipeline import score_models
from btm_scale.run_dir import RunDir

CONFIG = RunConfig.model_validate({"domains": {"math": {"text": "math"}}})
SMALL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 64,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run with one expert and the scores of another model that it trains."""

    class Ids:
        vocab_size = 300

    monkeypatch.setattr(membership.Tokenizer, "load", lambda directory: Ids())
    run = RunDir(tmp_path / "run")
    shutil.copytree(model(tmp_path / "first"), run.tokenizer)
    add_expert(CONFIG, run, tmp_path / "first", "first")
    for name in ("first", "math", "seed", "average/uniform"):
        write_scores(run, name)
    return run


def model(folder: Path) -> Path:
    write_model(folder, complete_weights(0, SMALL), SMALL)
    (folder / "vocab.json").write_text("{}")
    return folder


def adapter(folder: Path) -> Path:
    base = model(folder / "base")
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    folder = folder / "adapter"
    folder.mkdir()
    parts = {f"{name}.lora_A.weight": torch.ones(1, 16), f"{name}.lora_B.weight": torch.ones(16, 1)}
    save_file(parts, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def write_scores(run: RunDir, name: str) -> None:
    run.model_scores(name).mkdir(parents=True)
    (run.model_scores(name) / "math.dev.safetensors").write_text("numbers")


def listing(run: RunDir) -> set[str]:
    paths = {str(path.relative_to(run.root)) for path in run.root.rglob("*")}
    return {path for path in paths if not path.startswith(".locks")}


def kill_self(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killed_while_scoring(run: RunDir, source: Path) -> None:
    def score(aside: str) -> None:
        write_scores(run, aside)
        kill_self()

    with adding(CONFIG, run, source, "friend", score):
        pass


def killed_between_its_names(run: RunDir, source: Path) -> None:
    membership.sync_directory = kill_self  # after the scores got their name, and before the model gets it
    with adding(CONFIG, run, source, "friend", lambda aside: write_scores(run, aside)):
        pass


NEXT: dict[str, Callable[[RunDir, Path], object]] = {
    "forest add": lambda run, source: add_expert(CONFIG, run, source, "first"),
    "forest remove": lambda run, source: remove_from_forest(CONFIG, run, "first"),
    "score": lambda run, source: score_models(CONFIG, run, ["first"]),
}


@pytest.mark.parametrize("make", [model, adapter])
@pytest.mark.parametrize("kill", [killed_while_scoring, killed_between_its_names])
@pytest.mark.parametrize("following", NEXT)
def test_what_a_killed_addition_left_is_removed_by_the_next_command(
    make: Callable[[Path], Path],
    kill: Callable[[RunDir, Path], None],
    following: str,
    run: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("btm_scale.run.pipeline.missing_scores", lambda *_: [])
    before, source = listing(run), make(tmp_path / "friend")
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)
        try:
            kill(run, source)
        finally:
            os._exit(1)  # it was not killed
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    folders = {path for path in listing(run) - before if path.count("/") < 2 and path not in ("train", "scores")}
    assert len(folders) >= 2
    NEXT[following](run, tmp_path / "first")
    removed = {path for path in before if "first" in Path(path).parts} if following == "forest remove" else set()
    assert listing(run) - {"removed.json"} == before - removed


def test_a_living_addition_and_the_scores_of_other_models_stay(run: RunDir, tmp_path: Path) -> None:
    def score(aside: str) -> None:
        write_scores(run, aside)
        before = listing(run)
        remove_abandoned(CONFIG, run)
        assert listing(run) == before

    with adding(CONFIG, run, adapter(tmp_path), "friend", score):
        pass
    assert (run.model_scores("friend") / "math.dev.safetensors").is_file()
    assert listing(run) >= {"scores/seed", "scores/math", "scores/average/uniform", "experts/friend/config.json"}
    hidden = {path for path in listing(run) if path.startswith(".") or "/." in path}
    assert hidden == {f"experts/{name}/{HASHES}" for name in ("first", "friend")}


def test_an_interrupted_removal_is_completed_by_the_next_command(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_delete", lambda path: None)
    remove_expert(run, "first")
    monkeypatch.undo()
    assert [path for path in listing(run) if path.endswith(".removed")]
    remove_abandoned(CONFIG, run)
    assert not [path for path in listing(run) if ".removed" in path]
