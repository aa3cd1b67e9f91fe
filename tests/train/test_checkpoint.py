"""Which checkpoint a group resumes from, and which ones it keeps."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.worlds import run_script

from btm_scale.errors import CheckpointError
from btm_scale.train import checkpoint
from btm_scale.train.checkpoint import (
    newest_state,
    read_position,
    remove_old_states,
    save_state,
    state_path,
)
from btm_scale.train.position import Position, restore_random_state


def write_state(folder: Path, step: int) -> Path:
    """Write a folder that looks like a checkpoint."""
    path = state_path(folder, step)
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"tensors")
    digest = hashlib.sha256(b"tensors").hexdigest()
    (path / "state.json").write_text(json.dumps({"step": step, "adam_steps": 0, "random_state": "", "sha256": digest}))
    return path


def test_all_ranks_resume_from_the_checkpoint_that_the_first_rank_finds(tmp_path: Path) -> None:
    """A rank that resumed from an older checkpoint would silently train other weights than the rest."""
    here, late = tmp_path / "here", tmp_path / "late"
    for step in (1, 2):
        write_state(here, step)
    write_state(late, 1)
    run_script(Path(__file__).with_name("find_states.py"), [str(here), str(late)], tmp_path)
    assert [(folder / "found").read_text() for folder in (here, late)] == [str(state_path(here, 2))] * 2


def test_a_damaged_checkpoint_does_not_displace_a_usable_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_state(tmp_path, 100)
    (write_state(tmp_path, 200) / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(checkpoint, "_wait", lambda watch: None)
    monkeypatch.setattr(
        checkpoint, "write_state", lambda engine, folder, position, *_: write_state(folder, position.step)
    )
    group = SimpleNamespace(is_first=True, rank=0, size=1)
    job = SimpleNamespace(decay_after=lambda step: None)
    engine: Any = SimpleNamespace(group=group, job=job, parameters={}, adam_steps=0, loss_scale={}, kinds=())
    engine.routers = SimpleNamespace(load=())
    save_state(engine, tmp_path, 150, keep=1)
    assert newest_state(tmp_path) == state_path(tmp_path, 150)
    assert not state_path(tmp_path, 100).exists()


def test_what_a_killed_process_left_of_old_checkpoints_is_removed(tmp_path: Path) -> None:
    (write_state(tmp_path, 100) / "state.json").unlink()
    write_state(tmp_path, 200)
    kept = [write_state(tmp_path, step) for step in (300, 400, 500)]
    remove_old_states(tmp_path, 400, keep=2)
    assert sorted(tmp_path.iterdir()) == kept


def test_a_checkpoint_of_an_earlier_version_is_verified_by_its_one_digest(tmp_path: Path) -> None:
    path = write_state(tmp_path, 1)
    assert newest_state(tmp_path) == path
    (path / "model.safetensors").write_bytes(b"tensorz")
    assert newest_state(tmp_path) is None


@pytest.mark.parametrize("text", ["", base64.b64encode(bytes(100)).decode()])
def test_the_state_of_another_random_generator_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"random_state in state\.json of step 7 has \d+ bytes.* Delete this"):
        restore_random_state(Position(7, 7, text))


@pytest.mark.parametrize(("field", "value"), [("random_state", "?"), ("step", -1), ("adam_steps", 1 << 80)])
def test_a_marker_with_an_impossible_value_is_damaged(field: str, value: object, tmp_path: Path) -> None:
    content = {"step": 3, "adam_steps": 3, "random_state": "AA==", "sha256": "ab", field: value}
    (tmp_path / "state.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"state\.json is .*'{field}'"):
        read_position(tmp_path)
