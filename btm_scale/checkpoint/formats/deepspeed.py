"""Read DeepSpeed checkpoints in place: ZeRO 0 to 3 or universal, with or without tensor parallelism."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from btm_scale.checkpoint.formats.fields import Fields, natural
from btm_scale.checkpoint.formats.locate import read_name
from btm_scale.checkpoint.formats.megatron import MegatronModel, find_shape, is_megatron
from btm_scale.checkpoint.formats.pickles import load_pickle
from btm_scale.checkpoint.formats.stored import StoredModel, StoredTensor
from btm_scale.checkpoint.formats.tensors import ModelReader, TensorSpec
from btm_scale.checkpoint.formats.unread import has_unsupported, refuse_unread
from btm_scale.checkpoint.formats.zero import from_masters, named_tensors, trained_shapes, with_untrained
from btm_scale.errors import CheckpointError, few_names
from btm_scale.util.inside import file_inside

_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
Files = dict[tuple[int, int], Path]  # by (tensor rank, data rank)


def checkpoint_folder(path: Path) -> Path | None:
    """Return the folder that holds a DeepSpeed checkpoint's files: `path`, the one `latest` names, or None.

    Without `latest`, `latest_universal` names it, which DeepSpeed's conversion to a universal checkpoint writes.
    """
    latest = next((path / name for name in ("latest", "latest_universal") if (path / name).is_file()), None)
    folder = path if latest is None else file_inside(path, read_name(latest))
    return folder if _files(folder, _MODEL_FILE) or (folder / "zero").is_dir() or has_unsupported(folder) else None


def is_universal(path: Path) -> bool:
    """Whether a DeepSpeed checkpoint is a universal one."""
    folder = checkpoint_folder(path)
    return folder is not None and (folder / "zero").is_dir()


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
    models, optimizers = _files(folder, _MODEL_FILE), _files(folder, _OPTIMIZER_FILE)
    if (folder / "zero").is_dir():
        # The model states are there under the names that ZeRO 1 and 3 look for.
        refuse_unread(folder, [file for file in folder.iterdir() if _MODEL_FILE.fullmatch(file.name)])
        parts: list[StoredModel] = [_universal(folder, models)]
    else:
        refuse_unread(folder, {*models.values(), *optimizers.values()})
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
    if not files:
        return None
    file = min(files.values())
    step = Fields(load_pickle(file), file).get("global_steps")
    return step if step is None else natural(step, file, "global_steps", 1 << 62)


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
    file = models.get((tensor_rank, 0))
    if file is None:
        raise CheckpointError(f"{folder} lacks the model states of data rank 0. Copy the missing files here.")
    state = Fields(load_pickle(file), file)
    mine = {data: other for (tensor, data), other in optimizers.items() if tensor == tensor_rank}
    if mine and state.get("param_shapes"):
        states = _states(folder, tensor_rank, models, state)
        return StoredModel(folder, with_untrained(folder, from_masters(folder, state, mine), states))
    if not isinstance(state.get("module"), Mapping):
        raise CheckpointError(f"{file} has no `module`. It was not saved by DeepSpeed: copy it again.")
    if file.name.startswith("zero_pp_rank_"):
        raise CheckpointError(
            f"{folder} was saved by ZeRO 3, which leaves out the 16-bit weights. Read the float32 master weights, or "
            "save with stage3_gather_16bit_weights_on_model_save."
        )
    return StoredModel(folder, named_tensors(state.part("module")))


def _states(folder: Path, tensor_rank: int, models: Files, first: Fields) -> list[Fields]:
    """Return the model states of a tensor rank by data rank; of others than the first only if they have parameters."""
    mine = sorted((data, file) for (tensor, data), file in models.items() if tensor == tensor_rank)
    if not first.get("frozen_param_shapes"):
        return [first]
    if [data for data, _ in mine] != list(range(len(mine))):
        raise CheckpointError(
            f"{folder} has model states only of data ranks {[data for data, _ in mine]}. Copy the missing files here."
        )
    return [first, *(Fields(load_pickle(file), file) for _, file in mine[1:])]


def _universal(folder: Path, models: Files) -> StoredModel:
    """Open a universal checkpoint: one folder per parameter, with its full float32 weights.

    Those of ZeRO 3 are flat; their shapes, and the tensors that are not trained, are in the model states beside them.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in sorted((folder / "zero").glob("*/fp32.pt")):
        content = load_pickle(file_inside(folder, str(file.relative_to(folder))))
        value = content.get("param") if isinstance(content, Mapping) else content
        if not isinstance(value, StoredTensor):
            Fields({}, file).refuse("param", value, "a tensor")
        tensors[file.parent.name] = value
    if not tensors:
        raise CheckpointError(f"{folder / 'zero'} has no fp32.pt. Convert to a universal checkpoint again.")
    if {tensor for tensor, _ in models} != {0} or (0, 0) not in models:
        return StoredModel(folder, tensors)
    first = Fields(load_pickle(models[0, 0]), models[0, 0])
    shapes = _shapes(first)
    # With ZeRO 1 and 2, DeepSpeed writes the tensors that are not trained too, which `module` lists.
    parts = [name for name in ("module", "frozen_param_shapes", "shared_params") if first.get(name)]
    listed = {*shapes, *(name for part in parts for name in first.part(part).values)}
    if shapes and (unlisted := tensors.keys() - listed):
        raise CheckpointError(
            f"{models[0, 0]} does not list {few_names(unlisted, 'tensors')}, which {folder / 'zero'} has. Model states "
            "list every tensor: copy the files that belong together."
        )
    for name, shape in shapes.items():
        value = tensors.get(name)
        if value is None:
            raise CheckpointError(
                f"{folder / 'zero'} lacks '{name:.200}', which {models[0, 0].name} lists. Convert to a universal "
                "checkpoint again."
            )
        if value.spec.shape != shape:
            if value.stride is not None or value.spec.shape != (math.prod(shape),):
                first.refuse(f"param_shapes.{name}", shape, f"that of the tensor of shape {list(value.spec.shape)}")
            tensors[name] = replace(value, spec=TensorSpec(value.spec.dtype, shape))
    return StoredModel(folder, with_untrained(folder, tensors, _states(folder, 0, models, first)))


def _shapes(state: Fields) -> dict[str, tuple[int, ...]]:
    if not state.get("param_shapes"):
        return {}
    return {name: shape for group in trained_shapes(state) for name, shape in group.items()}
