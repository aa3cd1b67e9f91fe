"""Scaling of rotary positions by the YAML, beside transformers' own computation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_models import HUGGINGFACE_SIZES
from pydantic import ValidationError

from btm_scale.config.model import ModelConfig
from btm_scale.model.hf_config import config_json, shape_from_config
from btm_scale.model.rotary import rotary_frequencies

TYPES = ("yarn", "llama3", "linear")
SCALED: dict[str, dict[str, Any]] = {
    "none": {"max_position_embeddings": 64},
    "linear": {
        "max_position_embeddings": 128,
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    },
    "yarn": {
        "max_position_embeddings": 512,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 8.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 64,
        },
    },
}


def write_model(folder: Path, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(HUGGINGFACE_SIZES | {"model_type": "llama"} | settings))
    return folder


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("before", SCALED)
def test_the_exported_config_gives_transformers_the_same_frequencies(before: str, kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    pretrained = write_model(tmp_path / "model", **SCALED[before])
    model = ModelConfig.model_validate({"pretrained": pretrained, "rope": {"type": kind, "factor": 4}})
    shape = model.shape(vocabulary=1, positions=1)
    assert shape.positions == max(256, SCALED[before]["max_position_embeddings"]), "64 positions before any scaling"
    written = config_json(shape, dtype="float32", end_of_text=2)
    assert shape_from_config(written, "config.json") == shape
    theirs, attention = ROPE_INIT_FUNCTIONS[kind](AutoConfig.for_model(**written), "cpu")
    torch.testing.assert_close(rotary_frequencies(shape), theirs, atol=0, rtol=1e-5)
    assert shape.rope_scaling is not None
    assert shape.rope_scaling.attention == pytest.approx(attention)
    assert shape.rope_scaling.kind == kind
    assert shape.rope_scaling.factor == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_fast": 16.0, "beta_slow": 2.0},
        {"attention_factor": 1.5},
        {"mscale": 1.0, "mscale_all_dim": 0.7},
        {"truncate": False},
        {"factor": 1.0},
    ],
)
def test_every_setting_of_yarn_is_that_of_transformers(settings: dict[str, Any]) -> None:
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "yarn", "factor": 3.0, "rope_theta": 100.0, "original_max_position_embeddings": 32} | settings
    config = HUGGINGFACE_SIZES | {"model_type": "llama", "max_position_embeddings": 96, "rope_parameters": rope}
    shape = shape_from_config(config, "config.json")
    theirs, attention = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**config), "cpu")
    torch.testing.assert_close(rotary_frequencies(shape), theirs, atol=0, rtol=1e-5)
    assert shape.rope_scaling is not None
    assert shape.rope_scaling.attention == pytest.approx(attention)


def test_a_new_model_has_the_positions_of_its_sequences_after_scaling() -> None:
    sizes = {"layers": 1, "hidden": 16, "heads": 2, "ffn": 16}
    shape = ModelConfig.model_validate(sizes | {"rope": {"type": "yarn", "factor": 4}}).shape(65, 1000)
    assert shape.positions == 1000
    assert shape.rope_scaling is not None
    assert shape.rope_scaling.original == 250


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            {"family": "gpt2", "rope": {"type": "yarn", "factor": 4}},
            "gpt2 family has learned positions",
        ),
        ({"rope": {"type": "longrope", "factor": 4}}, "'yarn', 'llama3' or 'linear'"),
        ({"rope": {"type": "yarn", "factor": 0.5}}, "greater than or equal to 1"),
        ({"rope": {"type": "yarn"}}, "factor"),
    ],
)
def test_a_scaling_that_does_not_apply_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate({"layers": 1, "hidden": 16, "heads": 2, "ffn": 16} | model)
