"""Packed documents that do not attend to each other."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.worlds import run_script
from safetensors.torch import load_file

SHAPE = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "positions": 16, "vocabulary": 65}


def test_a_packed_document_gives_the_same_output_as_alone(tmp_path: Path) -> None:
    files = {recompute: str(tmp_path / f"{recompute}.safetensors") for recompute in ("none", "full")}
    run_script(Path(__file__).with_name("separate_documents.py"), {"shape": SHAPE, "files": files}, tmp_path)
    for file in files.values():
        outputs = load_file(file)
        torch.testing.assert_close(outputs["packed"], outputs["alone"], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(outputs["attended"], outputs["alone"], atol=1e-3)
