"""Files of a checkpoint that no reader looked at: their weights would be missing from whatever is made of it."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from btm_scale.errors import CheckpointError, few_names

_WEIGHTS = re.compile(
    r"layer_\d+.*\.pt|.*_(?:model|optim)_states\.pt|model_optim_rng\.pt|(?:expert|expp)_.*\.pt|.*\.distcp"
)
# What DeepSpeed saves of a mixture, and of a pipeline as in Megatron-DeepSpeed and GPT-NeoX.
_EXPERT = re.compile(r"(?:layer_\d+_)?expert_.*\.pt|expp_.*\.pt")
_PIPELINE = re.compile(r"layer_\d+-.*\.pt")
_RESAVE = "Load it with the program that saved it, and save the complete model from there."


def has_unsupported(folder: Path) -> bool:
    """Whether a folder has files of a mixture of experts or of a pipeline, which no reader supports."""
    names = (file.name for file in folder.iterdir()) if folder.is_dir() else ()
    return any(_EXPERT.fullmatch(name) or _PIPELINE.fullmatch(name) for name in names)


def refuse_unread(folder: Path, read: Collection[Path]) -> None:
    """Raise `CheckpointError` if a checkpoint's folder has files of weights beside those that are read."""
    known = {path.name for path in read}
    unread = sorted(file.name for file in folder.iterdir() if _WEIGHTS.fullmatch(file.name) and file.name not in known)
    if not unread:
        return
    if any(_EXPERT.fullmatch(name) for name in unread):
        what, remedy = "the weights of a mixture of experts", _RESAVE
    elif any(_PIPELINE.fullmatch(name) for name in unread):
        what, remedy = "the layers of a pipeline-parallel model", _RESAVE
    else:
        what, remedy = "weights in files that are not read", "Move files that do not belong to the checkpoint."
    raise CheckpointError(
        f"{folder} has {what}: {few_names(unread, 'files')}. A checkpoint is read completely or not at all. {remedy}"
    )
