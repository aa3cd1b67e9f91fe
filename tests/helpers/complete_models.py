"""Small models with every tensor that their config.json calls for, written without transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from btm_scale.checkpoint.expected import expected_tensors

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 65,
    "max_position_embeddings": 16,
    "torch_dtype": "bfloat16",
}


def complete_weights(
    seed: int, config: Mapping[str, Any] = LLAMA, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    """Return random weights of a config."""
    expected = expected_tensors(config)
    assert expected is not None
    shapes = {f"{expected.prefix}{name}": shape for name, shape in expected.body.items()}
    shapes |= {} if expected.tied else dict([next(iter(expected.heads.items()))])
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}


def write_model(folder: Path, weights: Mapping[str, torch.Tensor], config: Mapping[str, Any] = LLAMA) -> Path:
    """Write a model directory with one safetensors file."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(dict(weights), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_adapter(folder: Path, base: Path, tensors: Mapping[str, torch.Tensor], **settings: object) -> Path:
    """Write a LoRA adapter of rank 2, whose product counts twice unless the settings differ."""
    folder.mkdir()
    save_file(dict(tensors), folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base), **settings}
    (folder / "adapter_config.json").write_text(json.dumps(values))
    return folder


def quantize(
    weights: Mapping[str, torch.Tensor], block: tuple[int, int] | None = (16, 16), *, end: str = "_scale_inv"
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return fp8 matrices beside their scales, per block or per tensor, and the float32 values that they mean."""
    stored, meant = {}, {}
    for name, weight in weights.items():
        if "proj" not in name:
            stored[name], meant[name] = weight, weight.float()
            continue
        rows, columns = weight.shape
        height, width = block or (rows, columns)
        scales = torch.rand(-(-rows // height), -(-columns // width)) + 0.5
        full = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
        stored[name] = (weight.float() / full).to(torch.float8_e4m3fn)
        stored[name + end] = scales if block else scales.reshape(())
        meant[name] = stored[name].float() * full
    return stored, meant
