"""Every call of transformers' loaders sets the safety switches; import-linter restricts who may import it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [path for folder in ("btm_scale", "kernels", "launch") for path in sorted((ROOT / folder).rglob("*.py"))]
LOADERS = {"from_pretrained", "load_dataset", "snapshot_download", "hf_hub_download", "pipeline"}


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in LOADERS:
                yield name, node


def test_loaders_are_called_in_one_file_with_every_switch() -> None:
    loaders = [(path.name, name, node) for path in SOURCES for name, node in calls(path)]
    assert {path for path, _, _ in loaders} == {"hf_load.py"}
    for _, name, node in loaders:
        unpacked = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg is None]
        assert unpacked == ["_SAFE"], f"{name} in line {node.lineno}"


def test_the_switches_forbid_code_and_network() -> None:
    from btm_scale.model.hf_load import _SAFE

    assert _SAFE == {"local_files_only": True, "trust_remote_code": False}


def test_models_are_never_read_as_pickles() -> None:
    text = (ROOT / "btm_scale" / "model" / "hf_load.py").read_text()
    assert "weights_only=True" in text
