from __future__ import annotations

import pytest
import torch

from btm_scale.model.hf_names import cut, from_huggingface, join, table, to_huggingface
from btm_scale.model.hf_weights import huggingface_shapes
from btm_scale.model.shape import ModelShape

SHAPES = {
    "llama": ModelShape(layers=2, hidden=32, heads=4, kv_heads=4, ffn=24, positions=16, vocabulary=50, tied=False),
    "llama grouped, tied": ModelShape(layers=1, hidden=32, heads=4, kv_heads=2, ffn=24, positions=16, vocabulary=50),
    "mistral, wide heads": ModelShape(
        family="mistral",
        layers=1,
        hidden=32,
        heads=4,
        kv_heads=2,
        head_size=12,
        ffn=24,
        positions=16,
        vocabulary=50,
        window=8,
    ),
    "qwen2": ModelShape(family="qwen2", layers=2, hidden=32, heads=4, kv_heads=2, ffn=24, positions=16, vocabulary=51),
    "qwen3": ModelShape(
        family="qwen3",
        layers=2,
        hidden=36,
        heads=4,
        kv_heads=2,
        head_size=16,
        ffn=24,
        positions=16,
        vocabulary=51,
        tied=False,
    ),
    "gpt2": ModelShape(family="gpt2", layers=2, hidden=32, heads=4, kv_heads=4, ffn=64, positions=16, vocabulary=51),
}
shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def random_huggingface(shape: ModelShape) -> dict[str, torch.Tensor]:
    return {name: torch.randn(size) for name, size in huggingface_shapes(shape).items()}


@shapes
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_round_trip_through_all_tensor_ranks_is_bit_exact(shape: ModelShape, tensor: int) -> None:
    weights = random_huggingface(shape)
    rows = -(-shape.vocabulary // tensor) * tensor
    back = {}
    for entry in table(shape):
        parts = cut(entry, from_huggingface(entry, weights.__getitem__, shape, rows), tensor)
        assert len(parts) == tensor
        back |= to_huggingface(entry, join(entry, parts), shape)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


@shapes
def test_the_table_has_every_tensor_of_the_transformers_model_once(shape: ModelShape) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from btm_scale.model.hf_config import config_json

    settings = config_json(shape, dtype="float32", end_of_text=2)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
    theirs = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert huggingface_shapes(shape) == theirs
    names = [name for entry in table(shape) for name in entry.huggingface]
    assert len(names) == len(set(names))
    assert sum(parameter.numel() for parameter in model.parameters()) == shape.parameters
