"""Simulate a CPU with or without fp16 instructions for DeepSpeed in child processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def fake_fp16(monkeypatch: pytest.MonkeyPatch, folder: Path, *, is_supported: bool) -> None:
    """Make child processes detect a CPU with or without fp16 support."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import os, torch\ntorch.ops.mkldnn._is_mkldnn_fp16_supported = lambda: {is_supported}\n"
    )
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
