"""One door to every format of weights."""

from __future__ import annotations

from pathlib import Path

from btm_scale.checkpoint.safetensors import SafetensorsModel
from btm_scale.checkpoint.tensors import ModelReader


def open_model(path: Path) -> ModelReader:
    """Open a model of any known format; raises `CheckpointError` for what is none."""
    return SafetensorsModel(path)
