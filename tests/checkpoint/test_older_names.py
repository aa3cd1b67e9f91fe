"""Vision-language models under the names of before and after transformers 4.52 are the same models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from helpers.complete_models import write_adapter, write_model
from safetensors.torch import load_file

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.merge.merge import merge

Weights = Mapping[str, torch.Tensor]
CONFIG = {
    "model_type": "llava",
    "vision_config": {"model_type": "clip_vision_model"},
    "text_config": {"model_type": "llama", "hidden_size": 6},
}
QWEN = {"model_type": "of_qwen", "vision_config": {"depth": 1}}


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Return weights under the newer names."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "model.language_model.embed_tokens.weight": (9, 6),
        "model.language_model.layers.0.mlp.up_proj.weight": (8, 6),
        "model.language_model.norm.weight": (6,),
        **{f"model.visual.blocks.{i}.weight": (4, 4) for i in range(6)},
        "lm_head.weight": (9, 6),
    }
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def llava(newer: Weights) -> dict[str, torch.Tensor]:
    """Return weights under the older names of LLaVA."""
    return {
        name.replace("model.language_model.", "language_model.model.")
        .replace("model.visual.", "vision_tower.")
        .replace("lm_head.", "language_model.lm_head."): tensor
        for name, tensor in newer.items()
    }


def newer_llava(newer: Weights) -> dict[str, torch.Tensor]:
    return {name.replace("model.visual.", "model.vision_tower."): tensor for name, tensor in newer.items()}


def qwen(newer: Weights) -> dict[str, torch.Tensor]:
    """Return weights under the older names of Qwen2-VL."""
    return {
        name.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for name, tensor in newer.items()
    }


KINDS: dict[str, tuple[Callable[[Weights], Weights], Callable[[Weights], Weights], dict[str, object]]] = {
    "llava": (llava, newer_llava, CONFIG),
    "qwen-vl": (qwen, dict, QWEN),
}


@pytest.mark.parametrize(("older", "newer", "config"), KINDS.values(), ids=KINDS)
def test_models_with_older_and_newer_names_are_merged(
    older: Callable[[Weights], Weights], newer: Callable[[Weights], Weights], config: dict[str, object], tmp_path: Path
) -> None:
    old = write_model(tmp_path / "old", older(weights(0)), config)
    new, same = (write_model(tmp_path / name, newer(weights(i)), config) for i, name in ((1, "new"), (0, "same")))
    for name, first in (("renamed", old), ("plain", same)):
        merge(tmp_path / name, [(first, 1.0), (new, 1.0)])
    merged, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("renamed", "plain"))
    assert merged.keys() == newer(weights(0)).keys()
    # The language model is averaged, and the vision tower is the first model's.
    assert all(tensor.equal(expected[name]) for name, tensor in merged.items())
    tower = next(name for name in merged if "blocks.3" in name)
    assert merged[tower].equal(newer(weights(0))[tower])


@pytest.mark.parametrize("base_is_older", [True, False])
@pytest.mark.parametrize(("older", "newer", "config"), KINDS.values(), ids=KINDS)
def test_an_adapter_fits_a_base_with_the_names_of_another_version(
    older: Callable[[Weights], Weights],
    newer: Callable[[Weights], Weights],
    config: dict[str, object],
    base_is_older: bool,
    tmp_path: Path,
) -> None:
    of_base, of_adapter = (older, newer) if base_is_older else (newer, older)
    base = write_model(tmp_path / "base", of_base(weights(0)), config)
    (own,) = (name for name in of_adapter(weights(0)) if "up_proj" in name)
    module = f"base_model.model.{own.removesuffix('.weight')}"
    right, left = torch.randn(2, 6), torch.randn(8, 2)
    matrices = {f"{module}.lora_A.weight": right, f"{module}.lora_B.weight": left}
    adapter = write_adapter(tmp_path / "adapter", base, matrices)
    convert(adapter, tmp_path / "out", to="huggingface")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    (changed,) = (name for name in before if not after[name].equal(before[name]))
    assert "up_proj" in changed
    torch.testing.assert_close(after[changed], before[changed] + 2 * left @ right)
