"""torch_dist checkpoints to and from Megatron-core itself, at tensor parallel degrees 1 and 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.worlds import run_script
from safetensors.torch import load_file

from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.formats.torch_dist_writer import write_torch_dist
from btm_scale.checkpoint.hashing import content_hash
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.errors import CheckpointError
from btm_scale.model.hf_config import config_json
from btm_scale.model.hf_names import cut, from_huggingface, join, table, to_huggingface
from btm_scale.model.shape import ModelShape

SCRIPT = Path(__file__).with_name("torch_dist_with_megatron.py")
SIZES = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 40, "positions": 16, "vocabulary": 65}
SHAPES: dict[str, dict[str, Any]] = {
    "untied": SIZES | {"tied": False},
    "tied": SIZES | {"kv_heads": 4, "vocabulary": 64},
    "gpt2": SIZES | {"kv_heads": 4, "family": "gpt2"},
    "biases": SIZES | {"family": "qwen2"},
    "head-norms": SIZES | {"family": "qwen3", "head_size": 12},
}


def megatron(root: Path, verb: str, folders: dict[int, dict[str, str]], seed: int) -> None:
    """Save or load a folder per tensor degree and shape with Megatron-core, and save its weights beside it."""
    spec: dict[int, list[dict[str, Any]]] = {}
    for tensor, names in folders.items():
        spec[tensor] = []
        for shape, folder in names.items():
            (root / folder).mkdir(exist_ok=True)
            job = {"verb": verb, "seed": seed + tensor, "folder": str(root / folder), "shape": SHAPES[shape]}
            spec[tensor].append(job | {"out": str(root / f"{folder}-{verb}-{tensor}")})
    run_script(SCRIPT, spec, root)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`NAME-saved-T` by Megatron-core at tensor T, `NAME-merged-T` read from it, `NAME-written` by btm-scale."""
    root = tmp_path_factory.mktemp("torch_dist")
    degrees = (1, 2)
    saved = {tensor: {name: f"{name}-saved-{tensor}" for name in SHAPES} for tensor in degrees}
    megatron(root, "save", saved, seed=0)
    for name, sizes in SHAPES.items():
        config = config_json(ModelShape(**sizes), dtype="bfloat16", end_of_text=None)
        for tensor in degrees:
            (root / saved[tensor][name] / "config.json").write_text(json.dumps(config))
            merge(root / f"{name}-merged-{tensor}", [(root / saved[tensor][name], 1.0)])
        with open_model(root / f"{name}-merged-1") as model:
            write_torch_dist(root / f"{name}-written", model, ModelShape(**sizes), tensor=2)
    megatron(root, "load", {tensor: {name: f"{name}-written" for name in SHAPES} for tensor in degrees}, seed=77)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_checkpoints_saved_by_megatron_are_read_bit_for_bit(root: Path, name: str, tensor: int) -> None:
    shape = ModelShape(**SHAPES[name])
    parts = [load_file(root / f"{name}-saved-{tensor}-save-{tensor}-{rank}.safetensors") for rank in range(tensor)]
    compared = 0
    with open_model(root / f"{name}-merged-{tensor}") as model:
        for entry in table(shape):
            joined = join(entry, [part[entry.megatron] for part in parts])
            for tensor_name, expected in to_huggingface(entry, joined, shape).items():
                assert model.read(tensor_name).equal(expected), tensor_name
                compared += 1
        assert compared == len(model.names)


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_megatron_loads_written_checkpoints_bit_for_bit(root: Path, name: str, tensor: int) -> None:
    shape = ModelShape(**SHAPES[name])
    rows = -(-shape.vocabulary // tensor) * tensor
    with open_model(root / f"{name}-merged-1") as model:
        for rank in range(tensor):
            loaded = load_file(root / f"{name}-written-load-{tensor}-{rank}.safetensors")
            for entry in table(shape):
                expected = cut(entry, from_huggingface(entry, model.read, shape, rows), tensor)[rank]
                assert loaded[entry.megatron].equal(expected), entry.megatron


@pytest.mark.slow
def test_checkpoints_with_different_chunking_merge(root: Path, tmp_path: Path) -> None:
    config = (root / "untied-saved-2/config.json").read_text()
    (root / "untied-written/config.json").write_text(config)
    assert merge(tmp_path / "out", [(root / "untied-written", 1.0)]).content_hash == content_hash(
        root / "untied-merged-1"
    )
    mixed = merge(tmp_path / "mixed", [(root / "untied-written", 1.0), (root / "untied-saved-2", 1.0)])
    plain = merge(tmp_path / "plain", [(root / "untied-merged-1", 1.0), (root / "untied-merged-2", 1.0)])
    assert mixed.content_hash == plain.content_hash


@pytest.mark.slow
def test_a_truncated_data_file_raises(root: Path) -> None:
    file = next((root / "gpt2-saved-2").glob("*.distcp"))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="Copy it again"):
        open_model(root / "gpt2-saved-2")
    file.write_bytes(content)
