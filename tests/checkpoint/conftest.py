"""Small models on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from helpers.small_models import Save, Weights, random_weights

from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write a model directory: `save(name, weights, shard=bytes, config={...}, files={...})`."""

    def write(
        name: str,
        weights: Weights,
        *,
        shard: float = 5e9,
        config: Mapping[str, object] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> Path:
        directory = tmp_path / name
        specs = {key: TensorSpec.of(tensor) for key, tensor in weights.items()}
        with ShardedWriter(directory, specs, max_shard_bytes=shard) as writer:
            for key, tensor in weights.items():
                writer.write(key, tensor)
        described = config or {"model_type": "llama", "hidden_size": 16}
        (directory / "config.json").write_text(json.dumps(described))
        for file, text in (files or {}).items():
            (directory / file).write_text(text)
        return directory

    return write


@pytest.fixture
def models(save: Save) -> list[Path]:
    """Four different models, two of them in many shards."""
    return [save(f"m{i}", random_weights(i), shard=5e9 if i % 2 else 1500) for i in range(4)]
