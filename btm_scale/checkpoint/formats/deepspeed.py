"""DeepSpeed's checkpoints: ZeRO 0 to 3, tensor parallel or not, universal or not, read where they lie."""

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

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
Files = dict[tuple[int, int], Path]  # by (tensor rank, data rank)


def checkpoint_folder(path: Path) -> Path | None:
    """The folder of a DeepSpeed checkpoint's files: `path`, or the one that its `latest` names; or None."""
    latest = path / "latest"
    folder = path / latest.read_text().strip() if latest.is_file() else path
    return folder if _files(folder, _MODEL_FILE) or (folder / "zero").is_dir() else None


def open_deepspeed(path: Path, *, master: bool = True) -> ModelReader:
    """A DeepSpeed checkpoint under Hugging Face names if it is a Megatron-core model, else under its own.

    With `master` the float32 weights that the optimizer of ZeRO 1 to 3 keeps; without, or at ZeRO 0, those
    that the forward pass uses, which ZeRO 3 does not save whole. Raises `CheckpointError` for missing files.
    """
    folder = checkpoint_folder(path)
    if folder is None:
        raise CheckpointError(f"{path} is no DeepSpeed checkpoint.")
    if (folder / "zero").is_dir():
        parts: list[StoredModel] = [_universal(folder)]
    else:
        models, optimizers = _files(folder, _MODEL_FILE), _files(folder, _OPTIMIZER_FILE)
        ranks = sorted({tensor_rank for tensor_rank, _ in models})
        if ranks != list(range(len(ranks))):
            raise CheckpointError(f"{folder} has tensor ranks {ranks} only. Copy the others' files.")
        parts = [_part(folder, rank, models, optimizers if master else {}) for rank in ranks]
    if is_megatron(parts[0].names):
        return MegatronModel(path, parts, find_shape(folder))
    if len(parts) > 1:
        raise CheckpointError(f"{path} is cut over {len(parts)} tensor ranks and is no Megatron-core model.")
    return parts[0]


def training_step(path: Path) -> int | None:
    """The number of optimizer steps that a checkpoint was saved after, if it says so."""
    folder = checkpoint_folder(path)
    files = _files(folder, _MODEL_FILE) if folder else {}
    step = load_pickle(min(files.values())).get("global_steps") if files else None
    return step if isinstance(step, int) else None


def _files(folder: Path, pattern: re.Pattern[str]) -> Files:
    if not folder.is_dir():
        return {}
    found = ((pattern.fullmatch(file.name), file) for file in folder.iterdir())
    return {(int(match[2]), int(match[1] or 0)): file for match, file in found if match}


def _part(folder: Path, tensor_rank: int, models: Files, optimizers: Files) -> StoredModel:
    """One tensor rank's tensors."""
    state = load_pickle(models[tensor_rank, 0])
    mine = {data: file for (tensor, data), file in optimizers.items() if tensor == tensor_rank}
    if mine and state.get("param_shapes"):
        return StoredModel(folder, _from_masters(folder, state, mine))
    module = state.get("module")
    if not isinstance(module, Mapping):
        raise CheckpointError(f"{models[tensor_rank, 0]} holds no module. Was it written by DeepSpeed?")
    tensors = {name: value for name, value in module.items() if isinstance(value, StoredTensor)}
    if models[tensor_rank, 0].name.startswith("zero_pp_rank_"):
        raise CheckpointError(
            f"{folder} was saved by ZeRO 3, which leaves out the 16-bit weights. Read the float32 ones, or "
            "save with stage3_gather_16bit_weights_on_model_save."
        )
    return StoredModel(folder, tensors)


def _from_masters(folder: Path, state: Mapping[str, Any], files: Mapping[int, Path]) -> dict[str, StoredTensor]:
    """float32 weights of the trained parameters, and what else the model states hold."""
    states = [load_pickle(files[data])["optimizer_state_dict"] for data in sorted(files)]
    count = states[0]["partition_count"]
    world = max(count) if isinstance(count, (list, tuple)) else int(count)
    if sorted(files) != list(range(world)):
        raise CheckpointError(
            f"{folder} was saved by {world} data ranks and has the optimizer states of {sorted(files)}. "
            "Copy the missing files."
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
            raise CheckpointError(f"{folder} has frozen parameters under ZeRO 3, which are not read yet.")
        tensors |= {name: state["frozen_param_fragments"][name] for name in frozen}
    tensors |= {alias: tensors[name] for alias, name in (state.get("shared_params") or {}).items()}
    return tensors


def _enum_value(value: Any) -> int:
    """A number, or a member of an enumeration whose class was not loaded."""
    return int(value.arguments[0]) if isinstance(value, Inert) else int(value)


def _flat(partitions: Sequence[StoredTensor]) -> StoredTensor:
    """Flat arrays, one after the other."""
    segments = tuple(segment for partition in partitions for segment in partition.segments)
    return StoredTensor(
        TensorSpec(partitions[0].spec.dtype, (sum(partition.spec.elements for partition in partitions),)),
        segments,
    )


def _stage_2(
    shapes: Sequence[Mapping[str, tuple[int, ...]]], ranks: Sequence[Sequence[StoredTensor]], paddings: Any
) -> dict[str, StoredTensor]:
    """ZeRO 1 and 2: each group's parameters in a row, and the row cut evenly over the ranks."""
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
    """ZeRO 3: each parameter cut evenly over the ranks, and each rank's pieces in a row."""
    rows = [_flat(groups) for groups in ranks]
    length = rows[0].spec.elements
    everything = _flat(rows)
    tensors, position = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        elements = math.prod(shape)
        share = -(-elements // len(rows))
        pieces = [
            (length * i + position, length * i + position + max(0, min(share, elements - share * i)))
            for i in range(len(rows))
        ]
        tensors[name] = _cut(name, everything, shape, pieces)
        position += share
    return tensors


def _cut(name: str, row: StoredTensor, shape: tuple[int, ...], pieces: Sequence[tuple[int, int]]) -> StoredTensor:
    segments: tuple[Segment, ...] = sum((row.part(start, stop) for start, stop in pieces), ())
    if sum(segment.elements for segment in segments) != math.prod(shape):
        raise CheckpointError(f"the optimizer states end inside '{name}'. Copy the checkpoint again.")
    return StoredTensor(TensorSpec(row.spec.dtype, shape), segments)


def _universal(folder: Path) -> StoredModel:
    """A universal checkpoint: a folder a parameter, its float32 weights whole."""
    tensors = {}
    for file in sorted((folder / "zero").glob("*/fp32.pt")):
        content = load_pickle(file)
        value = content["param"] if isinstance(content, Mapping) else content
        tensors[file.parent.name] = value
    if not tensors:
        raise CheckpointError(f"{folder / 'zero'} has no fp32.pt. Make the universal checkpoint again.")
    return StoredModel(folder, tensors)
