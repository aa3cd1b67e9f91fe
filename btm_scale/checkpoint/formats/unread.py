"""Files of a checkpoint that no reader looked at: their weights would be missing from whatever is made of it."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from btm_scale.errors import CheckpointError, few_names

_WEIGHTS = re.compile(r"layer_\d+.*\.pt|.*_(?:model|optim)_states\.pt|model_optim_rng\.pt|.*\.distcp")
_EXPERT = re.compile(
    r"(?:layer_\d+_)?expert_\d+_mp_rank_\d+_model_states\.pt|expp_rank_\d+_mp_rank_\d+_optim_states\.pt"
)
_PIPELINE = re.compile(r"layer_\d+-model_\d+-model_states\.pt")  # as Megatron-DeepSpeed and GPT-NeoX save layers


def has_parts_of_models(folder: Path) -> bool:
    """Whether a folder has files of a mixture's experts or of a pipeline's layers."""
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    return any(_EXPERT.fullmatch(name) or _PIPELINE.fullmatch(name) for name in names)


def refuse_unread(folder: Path, read: Collection[Path]) -> None:
    """Raise `CheckpointError` if a checkpoint's folder has files of weights beside those that are read."""
    known = {path.name for path in read}
    unread = sorted(file.name for file in folder.iterdir() if _WEIGHTS.fullmatch(file.name) and file.name not in known)
    if not unread:
        return
    remedy = "Load it with the program that saved it, and save the complete model from there."
    if any(_EXPERT.fullmatch(name) for name in unread):
        what = "experts of a DeepSpeed mixture"
    elif any(_PIPELINE.fullmatch(name) for name in unread):
        what = "layers of a DeepSpeed pipeline"
    else:
        what = "weights in files that are not read"
        remedy = "Save the model as one state dict, or move files that do not belong to it."
    raise CheckpointError(
        f"{folder} has {what}: {few_names(unread, 'files')}. A checkpoint is read completely or not at all. {remedy}"
    )
