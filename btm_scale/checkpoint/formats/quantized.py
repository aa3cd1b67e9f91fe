"""Quantized weights: fp8 is multiplied by its scales while it is read, every other method is refused by its name."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from btm_scale.checkpoint.formats.locate import described_config, described_in, read_json
from btm_scale.checkpoint.formats.tensors import FP8, ModelReader, TensorSpec, parse_dtype, unknown_tensor
from btm_scale.errors import CheckpointError, few_names
from btm_scale.util.imports import torch

_SECTIONS = ("quantization_config", "compression_config")
_SCALES = ("_scale_inv", "_scale")  # both are factors, whatever the name of the first says
_ACTIVATION_SCALES = (".input_scale", ".output_scale", ".activation_scale", ".k_scale", ".v_scale", ".kv_scale")
_DEFAULT_BLOCK = (128, 128)
# Ends of tensor names that only one method writes.
_MARKS = (
    ("GPTQ", ".g_idx"),
    ("AWQ or GPTQ", ".qweight"),
    ("bitsandbytes", ".absmax"),
    ("bitsandbytes", ".SCB"),
    ("NVFP4", "weight_scale_2"),
    ("MXFP4", "_blocks"),
    ("compressed-tensors", ".weight_packed"),
    ("quanto", ".weight._data"),
)
_PUBLISHED = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "bitsandbytes_4bit": "bitsandbytes",
    "bitsandbytes_8bit": "bitsandbytes",
    "mxfp4": "MXFP4",
}
_BY_LOADING = ", or dequantize it in transformers (`model.dequantize()`) and save that"
_WAYS = {"MLX": ", or dequantize it with `mlx_lm.convert --dequantize`", "quanto": ""}
_PIECE = 1 << 19  # elements that are multiplied at a time
_SCALES_KEPT = 32  # tensors of scales in memory


def quantization_sections(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the quantization settings of a config.json, those of a nested text model included."""
    nested = config.get("text_config")
    holders = [config, nested] if isinstance(nested, dict) else [config]
    return [holder[key] for holder in holders for key in _SECTIONS if isinstance(holder.get(key), dict)]


def without_quantization(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json without its quantization settings."""
    plain = {key: value for key, value in config.items() if key not in _SECTIONS}
    if isinstance(plain.get("text_config"), dict):
        plain["text_config"] = without_quantization(plain["text_config"])
    return plain


def dequantized(model: ModelReader) -> ModelReader:
    """Return the model with the values that its fp8 weights and their scales mean; others are returned unchanged.

    Raises `CheckpointError` for weights of another quantization, and for fp8 weights without scales.
    """
    specs = model.specs()
    if not any(_is_suspect(spec) for spec in specs.values()):
        return model
    config = described_config(model.path)
    sections = quantization_sections(config)
    if method := _foreign_method(specs, sections):
        raise CheckpointError(
            f"{model.path} is quantized with {method}. Only fp8 weights with scales can be read, because other formats "
            f"round every weight anew. Use the unquantized model{_WAYS.get(method, _BY_LOADING)}."
        )
    fp8 = [name for name, spec in specs.items() if spec.code in FP8]
    scale_of = {name: f"{name}{end}" for end in reversed(_SCALES) for name in fp8 if f"{name}{end}" in specs}
    is_quantized = bool(sections or scale_of or read_json(described_in(model.path) / "hf_quant_config.json"))
    if is_quantized and (bare := [name for name in fp8 if name not in scale_of]):
        raise CheckpointError(
            f"{model.path} is quantized to fp8, but has no scales of {few_names(bare, 'tensors')}. Each fp8 weight "
            "needs one, as `NAME_scale_inv` or `NAME_scale`. Copy the model again, or use the unquantized one."
        )
    if not scale_of:
        return model
    return DequantizedModel(model, scale_of, _block_size(sections), _dtype_of(config))


def _is_suspect(spec: TensorSpec) -> bool:
    return spec.code in FP8 or not (spec.is_floating_point or spec.code == "BOOL")


def _foreign_method(specs: Mapping[str, TensorSpec], sections: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the name of a quantization that is not supported, or None."""
    named = next((str(section["quant_method"]) for section in sections if "quant_method" in section), "")
    marked = next((method for method, end in _MARKS if any(name.endswith(end) for name in specs)), None)
    integers = [
        name
        for name, spec in specs.items()
        if name.endswith("weight") and not spec.is_floating_point and spec.code != "BOOL"
    ]
    # MLX packs integers of few bits in `weight`, and has `scales` and `biases` beside it.
    if any(f"{name.removesuffix('weight')}scales" in specs for name in integers):
        return "MLX"
    if marked == "MXFP4" and not any(name.endswith("_scales") for name in specs):
        marked = None
    if marked is None and not (integers and (named or any(f"{name}_scale" in specs for name in integers))):
        return None
    return _PUBLISHED.get(named) or marked or named or "integers"


def _block_size(sections: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, as the config says, or None."""
    for section in sections:
        groups = section.get("config_groups")
        weights = (
            [group.get("weights") for group in groups.values() if isinstance(group, dict)]
            if isinstance(groups, dict)
            else []
        )
        sizes = [
            section.get("weight_block_size"),
            *(each.get("block_structure") for each in weights if isinstance(each, dict)),
        ]
        for size in sizes:
            if isinstance(size, list) and len(size) == 2 and all(type(each) is int and each > 0 for each in size):
                return size[0], size[1]
    return None


def _dtype_of(config: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that a config.json names for its unquantized weights, or bfloat16."""
    nested = config.get("text_config")
    for holder in (config, nested if isinstance(nested, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(holder.get(key), str) and "float8" not in holder[key]:
                try:
                    return parse_dtype(holder[key])
                except CheckpointError:
                    continue
    return torch.bfloat16


@dataclass(frozen=True)
class _Factors:
    """The scales of a tensor: [matrices, row blocks, column blocks], of blocks of `rows` x `columns` elements."""

    scales: torch.Tensor
    rows: int
    columns: int


class DequantizedModel(ModelReader):
    """A model whose fp8 weights are multiplied by their scales in float32, piece by piece.

    Their specs name the dtype in which they are written by default; `read_into` fills any floating-point dtype,
    rounding once.
    """

    def __init__(
        self, model: ModelReader, scale_of: Mapping[str, str], block: tuple[int, int] | None, dtype: torch.dtype
    ) -> None:
        self.path, self.stored = model.path, model
        self._scale_of, self._block, self._dtype = dict(scale_of), block, dtype
        dropped = {f"{name}{end}" for name in scale_of for end in _SCALES}
        self._names = tuple(
            name for name in model.names if name not in dropped and not name.endswith(_ACTIVATION_SCALES)
        )
        for name in scale_of:
            self._block_of(name)
        self._factors = functools.lru_cache(_SCALES_KEPT)(self._read_factors)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors but the scales, sorted."""
        return self._names

    def spec(self, name: str) -> TensorSpec:
        """Return a tensor's shape and the dtype in which it is written by default."""
        if name not in self._names:
            raise unknown_tensor(self.path, name)
        spec = self.stored.spec(name)
        return TensorSpec(self._dtype, spec.shape) if name in self._scale_of else spec

    def exact_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that holds a tensor without rounding it: float32 for a product with a scale."""
        return torch.float32 if name in self._scale_of else self.stored.exact_dtype(name)

    def read_into(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill `out`, of any floating-point dtype for a dequantized tensor, with elements from `start`."""
        if name not in self._scale_of:
            self.stored.read_into(name, start, out)
            return
        for begin in range(0, out.numel(), _PIECE):
            part = out[begin : begin + _PIECE]
            stored = self.stored.read_range(name, start + begin, start + begin + part.numel())
            part.copy_(stored.float().mul_(self._factor(name, start + begin, part.numel())))

    def close(self) -> None:
        """Close the stored model."""
        self.stored.close()

    def _factor(self, name: str, start: int, count: int) -> torch.Tensor:
        """Return the scale of each of `count` row-major elements, float32."""
        height, width = _matrix(self.stored.spec(name).shape)
        factors: _Factors = self._factors(name)
        first, last = start // width, -(-(start + count) // width)
        row = torch.arange(first, last)
        scales = factors.scales[row // height, row % height // factors.rows]
        columns = torch.arange(width) // factors.columns
        return scales[:, columns].reshape(-1)[start - first * width :][:count]

    def _read_factors(self, name: str) -> _Factors:
        rows, columns = self._block_of(name)
        shape = self.stored.spec(name).shape
        height, width = _matrix(shape)
        scales = self.stored.read(self._scale_of[name]).float()
        matrices = math.prod(shape[:-2]) if len(shape) > 2 else 1
        blocks = (-(-height // rows), -(-width // columns))
        if scales.numel() == 1:
            scales = scales.reshape(1, 1, 1).expand(matrices, *blocks)
        return _Factors(scales.reshape(matrices, *blocks), rows, columns)

    def _block_of(self, name: str) -> tuple[int, int]:
        """Return the rows and columns that share a scale. Raises `CheckpointError` if the shapes do not say."""
        shape, scales = self.stored.spec(name).shape, self.stored.spec(self._scale_of[name])
        height, width = _matrix(shape)
        leading = shape[:-2]
        own = scales.shape
        whole = (max(height, 1), max(width, 1))
        if scales.is_floating_point:
            if math.prod(own) == 1 or own in (leading, (*leading, 1, 1)):
                return whole
            rows, columns = self._block or _DEFAULT_BLOCK
            if own == (*leading, -(-height // rows), -(-width // columns)):
                return rows, columns
            if own in ((*leading, height), (*leading, height, 1)):
                return 1, whole[1]
        raise CheckpointError(
            f"{self.path}: the scales '{self._scale_of[name]}' {scales} do not fit '{name}' {list(shape)}. There must "
            "be one for the tensor, one per row, or one per block of weight_block_size in config.json. Use the "
            "config.json that belongs to these weights."
        )


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of the last two dimensions; a vector is one row."""
    return (shape[-2], shape[-1]) if len(shape) > 1 else (1, math.prod(shape))
