"""A killed run resumes in another layout, with the losses of the first layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.cuts import full
from helpers.killed_run import kill_after, steps_taken
from helpers.tiny_run import tiny_values, write_config
from helpers.warm import Warm

from btm_scale.forest.expert import read_expert
from btm_scale.run_dir import RunDir

pytestmark = pytest.mark.slow

STEPS, EVERY = 40, 4


def values(text: Path, **changes: Any) -> dict[str, Any]:
    """A run of one expert, on two data ranks with two micro-batches each, which get sequences of equal work."""
    sizes = {"family": "llama", "layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48}
    return tiny_values(
        text,
        model=sizes,
        domains={"python": {"text": "python.jsonl"}},
        novel_domains={},
        budget={
            "tokens": (STEPS + 2) * 256,
            "seed_share": 2 / (STEPS + 2),
            "sequence_length": 32,
            "batch_tokens": 256,
        },
        optimizer={"lr": 3e-3},
        layout={"data": 2, "zero": 1, "micro_batch": 2, "precision": "fp32"},
        checkpoint={"every": EVERY, "keep": 2},
        data={
            "dev": 0.1,
            "test": 0.1,
            "workers": 1,
            "separate_documents": True,
        },  # which data ranks share by their work
        baselines={"dense": False},
        evaluate={"tokens_per_domain": 500, "dev_blocks": 5, "averages": []},
        **changes,
    )


def losses(run: RunDir) -> list[float]:
    rows = [json.loads(line) for line in run.metrics("python").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(real_text: Path, warm: Warm, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("uninterrupted") / "run")
    write_config(run.root.parent / "tiny.yaml", values(real_text))
    warm.check("run", run.root.parent / "tiny.yaml", "--out", run.root)
    return run


@pytest.fixture(scope="module")
def killed(uninterrupted: RunDir, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A run with the same seed LM, killed between two checkpoints of its expert."""
    return killed_copy(uninterrupted, tmp_path_factory.mktemp("killed"))


def killed_copy(uninterrupted: RunDir, folder: Path) -> RunDir:
    run = RunDir(folder / "run")
    shutil.copytree(uninterrupted.root, run.root)
    shutil.copyfile(uninterrupted.root.parent / "tiny.yaml", run.root.parent / "tiny.yaml")
    for folder in (run.train("python"), run.model("python"), run.model_scores("python"), run.results.parent):
        shutil.rmtree(folder)
    kill_after(run.root.parent / "tiny.yaml", run, "python", 2 * EVERY + 2)
    assert steps_taken(run, "python") < STEPS
    assert not run.model("python").exists()
    return run


@pytest.mark.parametrize(
    ("edited", "settings", "last"),
    [
        pytest.param({"tensor": 2, "data": 1}, [], {"tensor": 2, "data": 1}, id="two tensor ranks by the YAML"),
        full({"context": 2, "data": 1}, [], {"context": 2, "data": 1}, id="two context ranks by the YAML"),
        full({}, ["layout.micro_batch=1"], {"data": 2, "micro_batch": 1}, id="half the micro-batch by --set"),
        full(
            {},
            ["layout.recompute=full", "seed_layout.zero=0"],
            {"data": 2, "recompute": "full", "zero": 1},
            id="full recomputation by --set",
        ),
    ],
)
def test_a_killed_run_resumes_in_another_layout_with_the_losses_of_the_first(
    edited: dict[str, int],
    settings: list[str],
    last: dict[str, Any],
    killed: RunDir,
    uninterrupted: RunDir,
    real_text: Path,
    warm: Warm,
    tmp_path: Path,
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(killed.root, run.root)
    changed = values(real_text)
    changed["layout"] |= edited
    write_config(tmp_path / "tiny.yaml", changed)
    options = [word for setting in settings for word in ("--set", setting)]
    warm.check("run", tmp_path / "tiny.yaml", "--out", run.root, *options)

    expected = losses(uninterrupted)
    assert len(expected) == STEPS
    assert losses(run) == pytest.approx(expected, abs=1e-5, rel=0)
    layout = read_expert(run.model("python")).layout
    assert {name: layout[name] for name in last} == last


@pytest.mark.full
def test_a_killed_run_whose_ranks_share_sequences_ends_with_the_bits_of_one_that_ran_through(
    real_text: Path, warm: Warm, tmp_path: Path
) -> None:
    sharing = values(real_text)
    sharing["layout"] |= {"context": 2, "zero": 2}
    (tmp_path / "uninterrupted").mkdir()
    (tmp_path / "killed").mkdir()
    write_config(tmp_path / "uninterrupted" / "tiny.yaml", sharing)
    uninterrupted = RunDir(tmp_path / "uninterrupted" / "run")
    warm.check("run", tmp_path / "uninterrupted" / "tiny.yaml", "--out", uninterrupted.root)
    run = killed_copy(uninterrupted, tmp_path / "killed")
    warm.check("run", tmp_path / "killed" / "tiny.yaml", "--out", run.root)

    assert losses(run) == losses(uninterrupted)
    assert read_expert(run.model("python")).content_hash == read_expert(uninterrupted.model("python")).content_hash
    assert run.results.read_bytes() == uninterrupted.results.read_bytes()
