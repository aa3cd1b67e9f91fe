"""Files of a checkpoint that no reader looked at: their weights would be missing from whatever is made of it."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from btm_scale.errors import CheckpointError, few_names

_WEIGHTS = re.compile(r"layer_\d+.*\.pt|.*_(?:model|optim)_states\.pt|model_optim_rng\.pt|.*\.distcp")
_EXPERT = re.compile(r"layer_\d+_expert_\d+_.*|expp_rank_.*")
_PIPELINE = re.compile(r"layer_\d+-.*")


def refuse_unread(folder: Path, read: Collection[Path]) -> None:
    """Raise `CheckpointError` if a checkpoint's folder has files of weights beside those that are read."""
    known = {path.name for path in read}
    unread = sorted(file.name for file in folder.iterdir() if _WEIGHTS.fullmatch(file.name) and file.name not in known)
    if not unread:
        return
    if any(_EXPERT.fullmatch(name) for name in unread):
        what = "the weights of a mixture of experts"
    elif any(_PIPELINE.fullmatch(name) for name in unread):
        what = "the layers of a pipeline-parallel model"
    else:
        what = "weights in files that are not read"
    raise CheckpointError(
        f"{folder} has {what}: {few_names(unread, 'files')}. A checkpoint is read completely or not at all. Save the "
        "model as one state dict, or move files that do not belong to it."
    )
