"""Read DeepSpeed checkpoints in place: ZeRO 0 to 3 or universal, with or without tensor parallelism."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btm_scale.checkpoint.formats.megatron import MegatronModel, find_shape, is_megatron
from btm_scale.checkpoint.formats.pickles import Inert, load_pickle
from btm_scale.checkpoint.formats.stored import Segment, StoredModel, StoredTensor
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec
from btm_scale.errors import CheckpointError
from btm_scale.util.inside import file_inside

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
Files = dict[tuple[int, int], Path]  # by (tensor rank, data rank)


def checkpoint_folder(path: Path) -> Path | None:
    """Return the folder that holds a DeepSpeed checkpoint's files: `path`, the one `latest` names, or None."""
    latest = path / "latest"
    folder = file_inside(path, latest.read_text().strip()) if latest.is_file() else path
    return folder if _files(folder, _MODEL_FILE) or (folder / "zero").is_dir() else None


def open_deepspeed(path: Path, *, master: bool = True) -> ModelReader:
    """Open a DeepSpeed checkpoint, a Megatron-core model under Hugging Face names, any other under its own names.

    `master=True` reads the float32 weights that the ZeRO 1-3 optimizer keeps. `master=False`, like ZeRO 0, reads the
    weights of the forward pass, which ZeRO 3 does not save. Raises `CheckpointError` for missing files.
    """
    folder = checkpoint_folder(path)
    if folder is None:
        raise CheckpointError(
            f"{path} is not a DeepSpeed checkpoint. Give the folder that has `latest` or *_model_states.pt."
        )
    if (folder / "zero").is_dir():
        parts: list[StoredModel] = [_universal(folder)]
    else:
        models, optimizers = _files(folder, _MODEL_FILE), _files(folder, _OPTIMIZER_FILE)
        ranks = sorted({tensor_rank for tensor_rank, _ in models})
        if ranks != list(range(len(ranks))):
            raise CheckpointError(f"{folder} has only tensor ranks {ranks}. Copy the other ranks' files here.")
        parts = [_part(folder, rank, models, optimizers if master else {}) for rank in ranks]
    if is_megatron(parts[0].names):
        return MegatronModel(path, parts, find_shape(folder))
    if len(parts) > 1:
        raise CheckpointError(
            f"{path} is sharded over {len(parts)} tensor ranks and is not a Megatron-core model. Only Megatron-core "
            "shards can be joined: save it without tensor parallelism."
        )
    return parts[0]


def training_step(path: Path) -> int | None:
    """Return the number of optimizer steps before the checkpoint, or None if it is not recorded."""
    folder = checkpoint_folder(path)
    files = _files(folder, _MODEL_FILE) if folder else {}
    step = load_pickle(min(files.values())).get("global_steps") if files else None
    return step if isinstance(step, int) else None


def tensor_degree(path: Path) -> int | None:
    """Return the number of tensor ranks that a checkpoint was written by, or None if it has no file per rank."""
    folder = checkpoint_folder(path)
    return len({rank for rank, _ in _files(folder, _MODEL_FILE)}) or None if folder else None


def _files(folder: Path, pattern: re.Pattern[str]) -> Files:
    if not folder.is_dir():
        return {}
    matches = ((pattern.fullmatch(file.name), file) for file in folder.iterdir())
    return {(int(match[2]), int(match[1] or 0)): file for match, file in matches if match}


def _part(folder: Path, tensor_rank: int, models: Files, optimizers: Files) -> StoredModel:
    """Return the tensors of one tensor rank."""
    state = load_pickle(models[tensor_rank, 0])
    mine = {data: file for (tensor, data), file in optimizers.items() if tensor == tensor_rank}
    if mine and state.get("param_shapes"):
        return StoredModel(folder, _from_masters(folder, state, mine))
    module = state.get("module")
    if not isinstance(module, Mapping):
        raise CheckpointError(
            f"{models[tensor_rank, 0]} has no `module`. It was not saved by DeepSpeed: copy it again."
        )
    tensors = {name: value for name, value in module.items() if isinstance(value, StoredTensor)}
    if models[tensor_rank, 0].name.startswith("zero_pp_rank_"):
        raise CheckpointError(
            f"{folder} was saved by ZeRO 3, which leaves out the 16-bit weights. Read the float32 master weights, or "
            "save with stage3_gather_16bit_weights_on_model_save."
        )
    return StoredModel(folder, tensors)


def _from_masters(folder: Path, state: Mapping[str, Any], files: Mapping[int, Path]) -> dict[str, StoredTensor]:
    """Return the float32 weights of the trained parameters, with the buffers and frozen parameters."""
    states = [load_pickle(files[data])["optimizer_state_dict"] for data in sorted(files)]
    count = states[0]["partition_count"]
    world = max(count) if isinstance(count, (list, tuple)) else int(count)
    if sorted(files) != list(range(world)):
        raise CheckpointError(
            f"{folder} was saved by {world} data ranks but has optimizer states only of ranks {sorted(files)}. Copy "
            "the missing files here."
        )
    stage = _enum_value(states[0].get("zero_stage", 1))
    shapes = [{name: tuple(size) for name, size in group.items()} for group in state["param_shapes"]]
    if stage == 3:
        tensors = _stage_3(shapes, [one["fp32_flat_groups"] for one in states])
    else:
        paddings = states[0].get("param_alignment_paddings")
        tensors = _stage_2(shapes, [one["single_partition_of_fp32_groups"] for one in states], paddings)
    module = state.get("module") or {}
    for name in state.get("buffer_names") or ():
        if isinstance(module.get(name), StoredTensor):
            tensors[name] = module[name]
    if frozen := state.get("frozen_param_shapes"):
        if stage == 3:
            raise CheckpointError(
                f"{folder} has frozen parameters under ZeRO 3. This is not supported: save with ZeRO 2."
            )
        tensors |= {name: state["frozen_param_fragments"][name] for name in frozen}
    tensors |= {alias: tensors[name] for alias, name in (state.get("shared_params") or {}).items()}
    return tensors


def _enum_value(value: Any) -> int:
    """Return the value of a number, or of an enum member whose class was not loaded."""
    return int(value.arguments[0]) if isinstance(value, Inert) else int(value)


def _flat(partitions: Sequence[StoredTensor]) -> StoredTensor:
    """Return the concatenation of flat arrays."""
    segments = tuple(segment for partition in partitions for segment in partition.segments)
    return StoredTensor(
        TensorSpec(partitions[0].spec.dtype, (sum(partition.spec.elements for partition in partitions),)),
        segments,
    )


def _stage_2(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], ranks: Sequence[Sequence[StoredTensor]], paddings: Any
) -> dict[str, StoredTensor]:
    """ZeRO 1 and 2: each parameter group is one flat array, split evenly over the ranks."""
    tensors = {}
    for i, group in enumerate(shapes):
        row = _flat([rank[i] for rank in ranks])
        position = 0
        for j, (name, shape) in enumerate(group.items()):
            stop = position + math.prod(shape)
            tensors[name] = _cut(name, row, shape, [(position, stop)])
            position = stop + (int(paddings[i][j]) if paddings is not None else 0)
    return tensors


def _stage_3(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], ranks: Sequence[Sequence[StoredTensor]]
) -> dict[str, StoredTensor]:
    """ZeRO 3: each parameter is split evenly over the ranks; a rank stores its pieces as one flat array."""
    rows = [_flat(groups) for groups in ranks]
    length = rows[0].spec.elements
    all_ranks = _flat(rows)
    tensors, position = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        elements = math.prod(shape)
        per_rank = -(-elements // len(rows))
        pieces = [
            (length * i + position, length * i + position + max(0, min(per_rank, elements - per_rank * i)))
            for i in range(len(rows))
        ]
        tensors[name] = _cut(name, all_ranks, shape, pieces)
        position += per_rank
    return tensors


def _cut(name: str, row: StoredTensor, shape: tuple[int, ...], pieces: Sequence[tuple[int, int]]) -> StoredTensor:
    segments: tuple[Segment, ...] = sum((row.part(start, stop) for start, stop in pieces), ())
    if sum(segment.elements for segment in segments) != math.prod(shape):
        raise CheckpointError(f"The optimizer states end inside '{name}'. Copy the checkpoint again.")
    return StoredTensor(TensorSpec(row.spec.dtype, shape), segments)


def _universal(folder: Path) -> StoredModel:
    """Open a universal checkpoint: one folder per parameter, with its full float32 weights."""
    tensors = {}
    for file in sorted((folder / "zero").glob("*/fp32.pt")):
        content = load_pickle(file)
        value = content["param"] if isinstance(content, Mapping) else content
        tensors[file.parent.name] = value
    if not tensors:
        raise CheckpointError(f"{folder / 'zero'} has no fp32.pt. Convert to a universal checkpoint again.")
    return StoredModel(folder, tensors)
