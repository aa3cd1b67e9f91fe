"""Describe a checkpoint from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from btm_scale.checkpoint.formats.based import require_completed, with_base
from btm_scale.checkpoint.formats.deepspeed import checkpoint_folder, tensor_degree, training_step
from btm_scale.checkpoint.formats.locate import described_config, iteration_folder
from btm_scale.checkpoint.formats.megatron import find_shape
from btm_scale.checkpoint.formats.megatron_legacy import legacy_iteration
from btm_scale.checkpoint.formats.open import format_of, open_stored
from btm_scale.checkpoint.formats.quantized import dequantized
from btm_scale.checkpoint.formats.tensors import ModelReader, dtype_name
from btm_scale.checkpoint.formats.torch_dist import saved_iteration
from btm_scale.checkpoint.formats.training import saved_step
from btm_scale.checkpoint.formats.weight_sets import weight_sets
from btm_scale.checkpoint.targets import MEGATRON, targets_of
from btm_scale.errors import CheckpointError

_SUFFIXES = {
    "safetensors": "*.safetensors",
    "bin": "*.bin",
    "torch_dist": "*.distcp",
    "megatron legacy": "model_optim_rng.pt",
    "dcp": "*.distcp",
    "deepspeed": "*.pt",
    "deepspeed universal": "*.pt",
    "training state": "*.safetensors",
    "adapter": "adapter_model.*",
}
_STEPS: dict[str, Callable[[Path], int | None]] = {
    "deepspeed": training_step,
    "deepspeed universal": training_step,
    "torch_dist": saved_iteration,
    "megatron legacy": legacy_iteration,
    "training state": saved_step,
}
_MAX_TENSOR_DEGREE = 64


@dataclass(frozen=True)
class Inspection:
    """Description of a checkpoint; `parameters` counts elements and `dtypes` counts them by dtype.

    `problem` says how the weights differ from the config. `converts_to` lists the formats to which the checkpoint can
    be converted, `tensor_degrees` the tensor parallel degrees of those that have one. `tensor_degree` is the tensor
    parallel degree at which the checkpoint was written, or None if its format does not record it.
    """

    path: Path
    format: str
    family: str | None
    tensors: int
    parameters: int
    dtypes: dict[str, int]
    files: dict[str, int]  # bytes by name
    weights: str | None  # the set of files that is read from a Hugging Face directory, and those that are not
    step: int | None
    tensor_degree: int | None
    problem: str | None
    converts_to: tuple[str, ...]
    tensor_degrees: tuple[int, ...]


def inspect(path: Path, *, base: Path | None = None) -> Inspection:
    """Describe a checkpoint of any readable format; `base` completes an adapter or a checkpoint without frozen weights.

    Raises `CheckpointError` for other formats and damaged files.
    """
    path = with_base(path, base)
    kind = format_of(path)
    require_completed(path, base)
    folder = (checkpoint_folder(path) if kind.startswith("deepspeed") else iteration_folder(path)) or path
    files = [folder] if folder.is_file() else sorted(folder.rglob(_SUFFIXES[kind]))
    config = described_config(path)
    with open_stored(path) as model:
        specs = model.specs().values()
        targets, problem = _targets(model, path)
    degrees = find_shape(path).tensor_degrees() if MEGATRON in targets else []
    dtypes: Counter[str] = Counter()
    for spec in specs:
        dtypes[dtype_name(spec.dtype)] += spec.elements
    return Inspection(
        path=path,
        format=kind,
        family=config.get("model_type"),
        tensors=len(specs),
        parameters=sum(dtypes.values()),
        dtypes=dict(dtypes),
        files={str(file.relative_to(folder.parent)): file.stat().st_size for file in files},
        weights=str(read) if (read := weight_sets(path)) else None,
        step=_STEPS[kind](path) if kind in _STEPS else None,
        tensor_degree=tensor_degree(path) if kind.startswith("deepspeed") else None,
        problem=problem,
        converts_to=targets,
        tensor_degrees=tuple(degree for degree in degrees if degree <= _MAX_TENSOR_DEGREE),
    )


def _targets(model: ModelReader, path: Path) -> tuple[tuple[str, ...], str | None]:
    """Return the formats that a stored model can be converted to, and how its weights differ from its config."""
    try:
        return targets_of(dequantized(model), path)
    except CheckpointError as error:  # of a quantization that cannot be read
        return (), str(error)
