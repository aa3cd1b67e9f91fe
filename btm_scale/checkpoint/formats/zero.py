"""The float32 weights in the optimizer states of DeepSpeed's ZeRO 1, 2 and 3, and what the model states add."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

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
    """Return the float32 weights of the trained parameters.

    `model` is the content of a model states file, and `files` are the optimizer states by data rank. Raises
    `CheckpointError`.
    """
    states = [Fields(load_pickle(files[data]), files[data]).part("optimizer_state_dict") for data in sorted(files)]
    _require_all_ranks(folder, states[0], files)
    shapes = trained_shapes(model)
    if _stage(states[0]) == 3:
        return _stage_3(shapes, [state.tensors("fp32_flat_groups") for state in states], folder)
    rows = [state.tensors("single_partition_of_fp32_groups") for state in states]
    return _stage_2(shapes, rows, _paddings(states[0], shapes), folder)


def trained_shapes(model: Fields) -> Shapes:
    """Return the shapes of the trained parameters by group. Raises `CheckpointError`."""
    shapes = [named_shapes(group, model.file, "param_shapes") for group in model.sequence("param_shapes")]
    if len(set().union(*shapes)) != sum(map(len, shapes)):
        raise CheckpointError(f"{model.file}: 'param_shapes' has a parameter in two groups. Save it again.")
    return shapes


def with_untrained(
    folder: Path, trained: Mapping[str, StoredTensor], models: Sequence[Fields]
) -> dict[str, StoredTensor]:
    """Return the trained parameters with the buffers, the frozen and the tied parameters.

    `models` are the model states by data rank, of which ZeRO 3 divides the frozen parameters. Raises
    `CheckpointError`.
    """
    model = models[0]
    module = named_tensors(model.part("module")) if model.get("module") else {}
    # ZeRO 3 leaves empty tensors in place of the parameters that it divides.
    tensors = {name: tensor for name, tensor in module.items() if tensor.spec.elements} | dict(trained)
    if model.get("frozen_param_shapes"):
        tensors |= _frozen(folder, models)
    for alias, name in model.part("shared_params").values.items() if model.get("shared_params") else ():
        if not isinstance(alias, str) or not isinstance(name, str) or name not in tensors:
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


def _frozen(folder: Path, models: Sequence[Fields]) -> dict[str, StoredTensor]:
    """Return the frozen parameters, which are complete in each rank's file or, under ZeRO 3, divided over all."""
    shapes = named_shapes(models[0].get("frozen_param_shapes"), models[0].file, "frozen_param_shapes")
    fragments = [model.part("frozen_param_fragments") for model in models]
    tensors: dict[str, StoredTensor] = {}
    for name, shape in shapes.items():
        first = fragments[0].get(name)
        if isinstance(first, StoredTensor) and first.spec.shape == shape:
            tensors[name] = first
            continue
        elements = math.prod(shape)
        per_rank = -(-elements // len(models))
        parts = []
        for each in fragments:
            part = each.get(name)
            flat = isinstance(part, StoredTensor) and part.stride is None and part.spec.shape == (per_rank,)
            if not flat or part.spec.dtype != first.spec.dtype:
                each.refuse(
                    name, part, f"a tensor of shape {list(shape)}, or the part of it of one of {len(models)} ranks"
                )
            parts.append(part)
        tensors[name] = _cut(name, _flat(parts, folder), shape, [(0, elements)], folder)
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
