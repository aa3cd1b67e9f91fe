"""Simulate a CPU with or without fp16 instructions for DeepSpeed in child processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def fake_fp16(monkeypatch: pytest.MonkeyPatch, folder: Path, *, is_supported: bool) -> None:
    """Make child processes detect a CPU with or without fp16 support."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import torch\n\n\ndef answer():\n    return {is_supported}\n\n\n"
        # torch.export looks at every operator's default overload.
        "answer.default = answer\ntorch.ops.mkldnn._is_mkldnn_fp16_supported = answer\n"
    )
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
