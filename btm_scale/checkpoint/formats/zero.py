"""The float32 weights in the optimizer states of DeepSpeed's ZeRO 1, 2 and 3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from btm_scale.checkpoint.formats.fields import Fields, named_shapes, natural, one_dtype
from btm_scale.checkpoint.formats.inert import Inert
from btm_scale.checkpoint.formats.pickles import load_pickle
from btm_scale.checkpoint.formats.stored import Segment, StoredTensor
from btm_scale.checkpoint.formats.tensors import TensorSpec
from btm_scale.errors import CheckpointError

Shapes = Sequence[Mapping[str, tuple[int, ...]]]  # of each parameter group


def named_tensors(fields: Fields) -> dict[str, StoredTensor]:
    """Return the tensors of a state dict; its other values are left out. Raises `CheckpointError`."""
    tensors = {name: value for name, value in fields.values.items() if isinstance(value, StoredTensor)}
    if odd := [name for name in tensors if not isinstance(name, str)]:
        fields.refuse(str(odd[0]), odd[0], "a name of a tensor")
    return tensors


def from_masters(folder: Path, model: Fields, files: Mapping[int, Path]) -> dict[str, StoredTensor]:
    """Return the float32 weights of the trained parameters, with the buffers and frozen parameters.

    `model` is the content of a model states file, and `files` are the optimizer states by data rank. Raises
    `CheckpointError`.
    """
    states = [Fields(load_pickle(files[data]), files[data]).part("optimizer_state_dict") for data in sorted(files)]
    _require_all_ranks(folder, states[0], files)
    stage = _stage(states[0])
    shapes = [named_shapes(group, model.file, "param_shapes") for group in model.sequence("param_shapes")]
    if len(set().union(*shapes)) != sum(map(len, shapes)):
        raise CheckpointError(f"{model.file}: 'param_shapes' has a parameter in two groups. Save it again.")
    if stage == 3:
        tensors = _stage_3(shapes, [state.tensors("fp32_flat_groups") for state in states], folder)
    else:
        rows = [state.tensors("single_partition_of_fp32_groups") for state in states]
        tensors = _stage_2(shapes, rows, _paddings(states[0], shapes), folder)
    module = named_tensors(model.part("module")) if model.get("module") else {}
    tensors |= {name: module[name] for name in model.names("buffer_names") if name in module}
    if model.get("frozen_param_shapes"):
        if stage == 3:
            raise CheckpointError(
                f"{folder} has frozen parameters under ZeRO 3. This is not supported: save with ZeRO 2."
            )
        tensors |= _frozen(model)
    for alias, name in model.part("shared_params").values.items() if model.get("shared_params") else ():
        if not isinstance(alias, str) or name not in tensors:
            model.refuse(f"shared_params.{alias}", name, "the name of a parameter")
        tensors[alias] = tensors[name]
    return tensors


def _require_all_ranks(folder: Path, state: Fields, files: Mapping[int, Path]) -> None:
    count = state.get("partition_count")
    counts = count if isinstance(count, (list, tuple)) and count else [count]
    world = max(natural(each, state.file, f"{state.path}partition_count") for each in counts)
    if len(files) != world or sorted(files) != list(range(world)):
        raise CheckpointError(
            f"{folder} was saved by {world} data ranks but has optimizer states only of ranks {sorted(files)}. Copy "
            "the missing files here."
        )


def _stage(state: Fields) -> int:
    """Return the ZeRO stage, also if it is an enum member whose class was not loaded."""
    value = state.get("zero_stage")
    if isinstance(value, Inert) and value.arguments:
        value = value.arguments[0]
    return 1 if value is None else natural(value, state.file, f"{state.path}zero_stage", 3)


def _paddings(state: Fields, shapes: Shapes) -> list[list[int]] | None:
    """Return the elements after each parameter, by group, or None if there are none."""
    name = "param_alignment_paddings"
    if state.get(name) is None:
        return None
    groups = state.sequence(name)
    for group, shape in zip(groups, shapes, strict=False):
        if not isinstance(group, (list, tuple)) or len(group) < len(shape):
            state.refuse(name, group, "a list with a number for each parameter")
    if len(groups) < len(shapes):
        state.refuse(name, groups, "a list with a number for each parameter of each group")
    return [[natural(each, state.file, f"{state.path}{name}") for each in group] for group in groups]


def _frozen(model: Fields) -> dict[str, StoredTensor]:
    fragments = model.part("frozen_param_fragments")
    shapes = named_shapes(model.get("frozen_param_shapes"), model.file, "frozen_param_shapes")
    tensors: dict[str, StoredTensor] = {}
    for name, shape in shapes.items():
        fragment: Any = fragments.get(name)
        if not isinstance(fragment, StoredTensor) or fragment.spec.shape != shape:
            fragments.refuse(name, fragment, f"a tensor of shape {list(shape)}")
        tensors[name] = fragment
    return tensors


def _flat(partitions: Sequence[StoredTensor], folder: Path) -> StoredTensor:
    """Return the concatenation of flat arrays."""
    segments = tuple(segment for partition in partitions for segment in partition.segments)
    dtype = one_dtype(partitions, folder, "the optimizer states")
    return StoredTensor(TensorSpec(dtype, (sum(partition.spec.elements for partition in partitions),)), segments)


def _stage_2(
    shapes: Shapes, ranks: Sequence[Sequence[StoredTensor]], paddings: list[list[int]] | None, folder: Path
) -> dict[str, StoredTensor]:
    """ZeRO 1 and 2: each parameter group is one flat array, split evenly over the ranks."""
    if any(len(rank) != len(shapes) for rank in ranks):
        raise CheckpointError(
            f"{folder} has {len(shapes)} parameter groups, but not in each optimizer state. {_REMEDY}"
        )
    tensors = {}
    for i, group in enumerate(shapes):
        row = _flat([rank[i] for rank in ranks], folder)
        position = 0
        for j, (name, shape) in enumerate(group.items()):
            stop = position + math.prod(shape)
            tensors[name] = _cut(name, row, shape, [(position, stop)], folder)
            position = stop + (paddings[i][j] if paddings is not None else 0)
    return tensors


def _stage_3(shapes: Shapes, ranks: Sequence[Sequence[StoredTensor]], folder: Path) -> dict[str, StoredTensor]:
    """ZeRO 3: each parameter is split evenly over the ranks; a rank stores its pieces as one flat array."""
    rows = [_flat(groups, folder) for groups in ranks]
    length = rows[0].spec.elements
    if any(row.spec.elements != length for row in rows):
        raise CheckpointError(f"{folder} has optimizer states of different lengths. {_REMEDY}")
    all_ranks = _flat(rows, folder)
    tensors, position = {}, 0
    for name, shape in ((name, shape) for group in shapes for name, shape in group.items()):
        elements = math.prod(shape)
        per_rank = -(-elements // len(rows))
        if position + per_rank > length:
            raise _ends_early(name, folder)
        pieces = [
            (length * i + position, length * i + position + max(0, min(per_rank, elements - per_rank * i)))
            for i in range(len(rows))
        ]
        tensors[name] = _cut(name, all_ranks, shape, pieces, folder)
        position += per_rank
    return tensors


def _cut(
    name: str, row: StoredTensor, shape: tuple[int, ...], pieces: Sequence[tuple[int, int]], folder: Path
) -> StoredTensor:
    segments: tuple[Segment, ...] = sum((row.part(start, stop) for start, stop in pieces), ())
    if sum(segment.elements for segment in segments) != math.prod(shape):
        raise _ends_early(name, folder)
    return StoredTensor(TensorSpec(row.spec.dtype, shape), segments)


def _ends_early(name: str, folder: Path) -> CheckpointError:
    return CheckpointError(f"The optimizer states in {folder} end inside '{name:.100}'. {_REMEDY}")


_REMEDY = "Copy the checkpoint again."
