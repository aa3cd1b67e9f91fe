"""A run of four experts whose mixture is made without scoring it, and changes to its models."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import save_file
from torch import Tensor

from btm_scale.checkpoint.hashing import content_hash
from btm_scale.config.run import RunConfig
from btm_scale.forest.expert import CARD, read_expert
from btm_scale.run import upcycle
from btm_scale.run_dir import RunDir

Run = tuple[RunConfig, RunDir]
WEIGHTS = "model.safetensors"


def unscored(handmade: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a copy of the run, in which nothing is scored: that would start a group."""
    config, made = handmade
    shutil.copytree(made.root, folder / "run", symlinks=True)
    monkeypatch.setattr(upcycle, "score_models", lambda *_: [])
    return config, RunDir(folder / "run")


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file by its path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def change(directory: Path, weights: dict[str, Tensor]) -> None:
    """Write other weights, and their hash."""
    save_file(weights, directory / WEIGHTS, {"format": "pt"})
    read_expert(directory).model_copy(update={"content_hash": content_hash(directory)}).save(directory / CARD)
