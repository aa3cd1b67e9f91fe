"""Describe a checkpoint from its headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from btm_scale.checkpoint.completeness import has_stacked_experts, require_complete
from btm_scale.checkpoint.convert import UNIVERSAL, WRITERS, require_described
from btm_scale.checkpoint.formats.based import require_completed, with_base
from btm_scale.checkpoint.formats.deepspeed import checkpoint_folder, tensor_degree, training_step
from btm_scale.checkpoint.formats.locate import described_config, iteration_folder
from btm_scale.checkpoint.formats.megatron import find_shape
from btm_scale.checkpoint.formats.megatron_legacy import legacy_iteration
from btm_scale.checkpoint.formats.open import format_of, open_stored, with_head_names
from btm_scale.checkpoint.formats.quantized import dequantized
from btm_scale.checkpoint.formats.tensors import ModelReader, dtype_name
from btm_scale.checkpoint.formats.torch_dist import saved_iteration
from btm_scale.checkpoint.formats.training import saved_step
from btm_scale.checkpoint.formats.weight_sets import weight_sets
from btm_scale.errors import CheckpointError
from btm_scale.model.shape import ModelShape

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

    `converts_to` lists the formats it can be converted to, `tensor_degrees` the tensor parallel degrees available; both
    are empty if `problem` says that the weights do not fit the config. `tensor_degree` is the tensor parallel degree at
    which the checkpoint was written, or None if its format does not record it.
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
        shape = _shape_or_none(path)
        problem = _problem(model, shape)
    fitting = shape if problem is None else None
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
        converts_to=() if problem else ("huggingface", *_other_targets(kind, shape)),
        tensor_degrees=tuple(n for n in fitting.tensor_degrees() if n <= _MAX_TENSOR_DEGREE) if fitting else (),
    )


def _other_targets(kind: str, shape: ModelShape | None) -> tuple[str, ...]:
    if shape is None or shape.experts:
        return ()
    return (*WRITERS, UNIVERSAL) if kind == "training state" else tuple(WRITERS)


def _problem(model: ModelReader, shape: ModelShape | None) -> str | None:
    """Return how the weights of a model differ from its config, or None if they fit or its family is not supported."""
    try:
        model = dequantized(model)
        require_complete(model)
        if shape is not None and not has_stacked_experts(model):
            require_described(with_head_names(model), shape)
    except CheckpointError as error:
        return str(error)
    return None


def _shape_or_none(path: Path) -> ModelShape | None:
    """Return the model's shape, or None if no config.json describes a supported family."""
    try:
        return find_shape(path)
    except CheckpointError:
        return None
