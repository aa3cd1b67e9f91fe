"""Read Megatron's format before `torch_dist`: a file `model_optim_rng.pt` per tensor and pipeline rank."""

from __future__ import annotations

import re
from pathlib import Path

from btm_scale.checkpoint.formats.fields import Fields, natural
from btm_scale.checkpoint.formats.locate import iteration_folder
from btm_scale.checkpoint.formats.megatron import MegatronModel, find_shape
from btm_scale.checkpoint.formats.megatron_args import legacy_files
from btm_scale.checkpoint.formats.pickles import load_pickle
from btm_scale.checkpoint.formats.stored import StoredModel, StoredTensor
from btm_scale.checkpoint.formats.torch_dist import NORMS
from btm_scale.checkpoint.formats.zero import named_tensors
from btm_scale.errors import CheckpointError

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")


def open_megatron_legacy(path: Path) -> MegatronModel:
    """Open the checkpoint of Megatron-core's model under Hugging Face names. Raises `CheckpointError`."""
    folder = iteration_folder(path)
    files = legacy_files(folder)
    tensor, pipeline = (1 + max(rank[axis] for rank in files) for axis in (0, 1))
    if missing := [(i, j) for i in range(tensor) for j in range(pipeline) if (i, j) not in files]:
        raise CheckpointError(
            f"{folder} has {tensor} tensor and {pipeline} pipeline ranks, but lacks the file of tensor rank "
            f"{missing[0][0]} and pipeline rank {missing[0][1]}. Copy the missing files here."
        )
    shape = find_shape(path, "a Megatron checkpoint of mp_rank_* folders")
    parts = []
    for i in range(tensor):
        tensors: dict[str, StoredTensor] = {}
        layers = 0
        for j in range(pipeline):
            stage = _stage(files[i, j], layers)
            if shape.tied and j > 0:
                stage.pop("output_layer.weight", None)  # the last stage's copy of the embedding
            tensors |= stage
            layers = 1 + max((int(match[1]) for name in tensors if (match := _LAYER.fullmatch(name))), default=-1)
        parts.append(StoredModel(folder, tensors))
    return MegatronModel(path, parts, shape)


def legacy_iteration(path: Path) -> int | None:
    """Return the training step in the first rank's file, or None."""
    files = legacy_files(iteration_folder(path))
    file = min(files.items())[1]
    step = Fields(load_pickle(file), file).get("iteration")
    return None if step is None else natural(step, file, "iteration", 1 << 62)


def _stage(file: Path, first_layer: int) -> dict[str, StoredTensor]:
    """Return the tensors of one pipeline stage, whose layers begin at `first_layer` of the model."""
    content = Fields(load_pickle(file), file)
    if content.get("model0") is not None:
        raise CheckpointError(
            f"{file} was saved with interleaved pipeline stages, which cannot be read. Save it with --ckpt-format "
            "torch_dist."
        )
    model = content.part("model")
    if model.get("language_model") is not None:
        raise CheckpointError(
            f"{file} was saved by Megatron's former model classes, which cannot be read. Convert it with Megatron-LM's "
            "tools/checkpoint/convert.py to Megatron-core."
        )
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in named_tensors(model).items():
        match = _LAYER.fullmatch(name)
        own = name if match is None else f"decoder.layers.{int(match[1]) + first_layer}.{match[2]}"
        for fused, separate in NORMS.items():
            own = own.replace(fused, separate)
        if not own.endswith("_extra_state"):
            tensors[own] = tensor
    if not tensors:
        raise CheckpointError(f"{file} has no tensors in 'model'. Copy the checkpoint again.")
    return tensors
