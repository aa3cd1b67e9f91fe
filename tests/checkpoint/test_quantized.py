"""fp8 weights mean their values times their scales; weights of other quantizations are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.complete_models import LLAMA, complete_weights, quantize, write_model
from safetensors.torch import load_file

from btm_scale.checkpoint.convert import convert
from btm_scale.checkpoint.formats.open import open_model
from btm_scale.checkpoint.inspect import inspect
from btm_scale.checkpoint.merge.merge import merge
from btm_scale.errors import CheckpointError

FP8 = LLAMA | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}
PER_TENSOR = LLAMA | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}}
KINDS: dict[str, tuple[Any, ...]] = {
    "per block": (FP8, (16, 16), "_scale_inv"),
    "per block of odd size": (
        LLAMA | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [10, 24]}},
        (10, 24),
        "_scale_inv",
    ),
    "per tensor": (PER_TENSOR, None, "_scale"),
    "per row": (LLAMA | {"quantization_config": {"quant_method": "fbgemm_fp8"}}, (1, 32), "_scale"),
    "without a section in config.json": (LLAMA, None, "_scale"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_are_those_that_the_scales_mean(kind: str, tmp_path: Path) -> None:
    config, block, end = KINDS[kind]
    wide = config | {"hidden_size": 32, "intermediate_size": 32} if kind == "per row" else config
    stored, meant = quantize(complete_weights(0, wide), block, end=end)
    stored |= {"model.layers.0.self_attn.k_proj.input_scale": torch.tensor(3.0)}
    model = write_model(tmp_path / "model", stored, wide)
    convert(model, tmp_path / "exact", to="huggingface", dtype="float32", verify=True)
    exact = load_file(tmp_path / "exact/model.safetensors")
    assert exact.keys() == meant.keys()
    assert all(exact[name].equal(meant[name]) for name in meant)
    config = json.loads((tmp_path / "exact/config.json").read_text())
    assert "quantization_config" not in config
    assert config["torch_dtype"] == "float32"


def test_means_are_computed_from_the_exact_values_and_rounded_once(tmp_path: Path) -> None:
    stored, meant = quantize(complete_weights(0, dtype=torch.float32))
    a = write_model(tmp_path / "a", stored, FP8)
    plain = complete_weights(1)
    b = write_model(tmp_path / "b", plain)
    merge(tmp_path / "out", [(a, 1.0), (b, 1.0)], dtype="bfloat16", chunk_bytes=100)
    merged = load_file(tmp_path / "out/model.safetensors")
    for name, weight in meant.items():
        assert merged[name].equal(((weight.double() + plain[name].double()) / 2).bfloat16())


def test_any_range_of_a_tensor_is_read_alone(tmp_path: Path) -> None:
    stored, meant = quantize(complete_weights(0), (10, 24))
    config = LLAMA | {"quantization_config": {"quant_method": "fp8", "weight_block_size": [10, 24]}}
    name = "model.layers.1.mlp.down_proj.weight"
    with open_model(write_model(tmp_path / "model", stored, config)) as model:
        for start, stop in ((0, 1), (47, 49), (5, 1000), (1535, 1536), (3, 3)):
            expected = meant[name].reshape(-1)[start:stop].bfloat16()
            assert model.read_range(name, start, stop).equal(expected)


@pytest.mark.parametrize("to", ["megatron", "deepspeed"])
def test_a_quantized_model_is_converted_to_every_format(to: str, tmp_path: Path) -> None:
    stored, meant = quantize(complete_weights(0))
    model = write_model(tmp_path / "model", stored, FP8)
    convert(model, tmp_path / "there", to=to, dtype="float32", verify=True)
    convert(tmp_path / "there", tmp_path / "back", to="huggingface")
    back = load_file(tmp_path / "back/model.safetensors")
    assert all(back[name].equal(meant[name]) for name in meant)


def test_stacked_experts_have_scales_of_each_matrix(tmp_path: Path) -> None:
    weight = torch.randn(3, 20, 8)
    scales = torch.rand(3, 2, 1) + 0.5
    stored = (weight / scales.repeat_interleave(10, 1)).to(torch.float8_e4m3fn)
    config = {"model_type": "new", "quantization_config": {"quant_method": "fp8", "weight_block_size": [10, 8]}}
    tensors = {"experts.up_proj": stored, "experts.up_proj_scale_inv": scales}
    convert(write_model(tmp_path / "model", tensors, config), tmp_path / "out", to="huggingface", dtype="float32")
    expected = stored.float() * scales.repeat_interleave(10, 1)
    assert load_file(tmp_path / "out/model.safetensors")["experts.up_proj"].equal(expected)


def test_scales_may_be_powers_of_two_in_8_bits(tmp_path: Path) -> None:
    stored, _ = quantize(complete_weights(0))
    powers = {
        name: tensor.to(torch.float8_e8m0fnu) if name.endswith("_scale_inv") else tensor
        for name, tensor in stored.items()
    }
    convert(write_model(tmp_path / "model", powers, FP8), tmp_path / "out", to="huggingface", dtype="float32")
    name = "model.layers.0.self_attn.q_proj.weight"
    scales = powers[f"{name}_scale_inv"].float().repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert load_file(tmp_path / "out/model.safetensors")[name].equal(stored[name].float() * scales)


def test_fp8_without_scales_or_with_scales_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    stored, _ = quantize(complete_weights(0))
    bare = {name: tensor for name, tensor in stored.items() if not name.endswith("q_proj.weight_scale_inv")}
    with pytest.raises(
        CheckpointError, match=r"is quantized to fp8, but has no scales of 'model\.layers\.0\.self_attn\.q"
    ):
        merge(tmp_path / "out", [(write_model(tmp_path / "bare", bare, FP8), 1.0)])
    with pytest.raises(CheckpointError, match=r"the scales .* do not fit"):
        merge(tmp_path / "out", [(write_model(tmp_path / "other", stored, LLAMA), 1.0)])
    assert not (tmp_path / "out").exists()


METHODS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "GPTQ": (
        {"quant_method": "gptq"},
        {"qweight": torch.ones(4, 8, dtype=torch.int32), "g_idx": torch.ones(4, dtype=torch.int32)},
    ),
    "AWQ": ({"quant_method": "awq"}, {"qweight": torch.ones(4, 8, dtype=torch.int32)}),
    "AWQ or GPTQ": ({}, {"qweight": torch.ones(4, 8, dtype=torch.int32)}),
    "bitsandbytes": (
        {},
        {"weight": torch.ones(16, 1, dtype=torch.uint8), "weight.absmax": torch.ones(4)},
    ),
    "bitsandbytes in 8 bits": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"weight": torch.ones(4, 4, dtype=torch.int8), "SCB": torch.ones(4)},
    ),
    "MXFP4": (
        {"quant_method": "mxfp4"},
        {"weight_blocks": torch.ones(4, 4, dtype=torch.uint8), "weight_scales": torch.ones(4, dtype=torch.uint8)},
    ),
    "compressed-tensors": (
        {"quant_method": "compressed-tensors"},
        {"weight_packed": torch.ones(4, dtype=torch.int32), "weight_scale": torch.ones(4)},
    ),
    "MLX": (
        {},
        {"weight": torch.ones(4, 1).int(), "scales": torch.ones(4, 1), "biases": torch.ones(4, 1)},
    ),
    "quanto": ({}, {"weight._data": torch.ones(4, 4, dtype=torch.int8), "weight._scale": torch.ones(4, 1)}),
    "hqq": ({"quant_method": "hqq"}, {"weight": torch.ones(4, 4, dtype=torch.uint8)}),
}


@pytest.mark.parametrize("method", METHODS)
def test_other_quantizations_are_refused_by_their_name(method: str, tmp_path: Path) -> None:
    section, tensors = METHODS[method]
    names = {f"model.layers.0.mlp.up_proj.{name}": tensor for name, tensor in tensors.items()}
    model = write_model(tmp_path / "model", names, {"model_type": "llama", "quantization_config": section})
    for write in (
        lambda: merge(tmp_path / "out", [(model, 1.0)]),
        lambda: convert(model, tmp_path / "out", to="huggingface"),
    ):
        with pytest.raises(CheckpointError, match=rf"is quantized with {method.split(' in ')[0]}\. .*Use the unquan"):
            write()
    described = inspect(model)
    assert "is quantized with" in str(described.problem)
    assert described.converts_to == ()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_config_that_still_names_a_quantization_is_corrected(tmp_path: Path) -> None:
    section = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    model = write_model(tmp_path / "model", complete_weights(0), LLAMA | section)
    for target in inspect(model).converts_to:
        convert(model, tmp_path / target, to=target, verify=True)
        assert "quantization_config" not in json.loads((tmp_path / target / "config.json").read_text())
    assert (tmp_path / "megatron").is_dir()


def test_integer_masks_of_old_checkpoints_are_no_quantization(tmp_path: Path) -> None:
    weights = {"h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8), "h.0.attn.weight": torch.ones(2)}
    model = write_model(tmp_path / "model", weights, {"model_type": "new"})
    merge(tmp_path / "out", [(model, 1.0)])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_is_not_written_without_scales(dtype: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", complete_weights(0))
    for write in (
        lambda: merge(tmp_path / "out", [(model, 1.0)], dtype=dtype),
        lambda: convert(model, tmp_path / "out", to="megatron", dtype=dtype),
    ):
        with pytest.raises(CheckpointError, match=f"Weights in {dtype} need scales, which are not written"):
            write()
    assert not (tmp_path / "out").exists()
