"""Write DeepSpeed model states, which `engine.load_checkpoint(..., load_module_only=True)` loads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.model.hf_names import cut, from_huggingface, table
from btm_scale.model.shape import ModelShape
from btm_scale.util.files import make_directory, require_space

TAG = "global_step0"


def write_model_states(
    directory: Path,
    model: ModelReader,
    shape: ModelShape,
    *,
    tensor: int = 1,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a Hugging Face model as `mp_rank_XX_model_states.pt`, one file per tensor rank.

    Shards are staged in memory-mapped scratch files, so only one tensor is in memory at a time. Raises
    `CheckpointError` if the disk has too little space.
    """
    folder = directory / TAG
    size = model.nbytes_as(dtype)
    require_space(directory, size + 2 * size // tensor)
    make_directory(directory.parent)
    folder.mkdir(parents=True)
    rows = -(-shape.vocabulary // tensor) * tensor
    for rank in range(tensor):
        scratch = folder / f".scratch-{rank}"
        module = {}
        for i, entry in enumerate(table(shape)):
            part = cut(entry, from_huggingface(entry, model.read, shape, rows), tensor)[rank]
            part = part if dtype is None else part.to(dtype)
            _allocate(Path(f"{scratch}-{i}"), part.numel() * part.dtype.itemsize)
            mapped = torch.from_file(f"{scratch}-{i}", shared=True, size=part.numel(), dtype=part.dtype)
            mapped.copy_(part.reshape(-1))
            module[entry.megatron] = mapped.view(part.shape)
        state: dict[str, Any] = {
            "module": module,
            "buffer_names": [],
            "optimizer": None,
            "param_shapes": None,
            "frozen_param_shapes": None,
            "frozen_param_fragments": None,
            "shared_params": None,
            "lr_scheduler": None,
            "data_sampler": None,
            "random_ltd": None,
            "sparse_tensor_module_names": [],
            "skipped_steps": 0,
            "global_steps": 0,
            "global_samples": 0,
            "dp_world_size": 1,
            "mp_world_size": tensor,
            "ds_config": {},
            "ds_version": "0",
        }
        # With an open file, a failed write is an OSError; torch.save(path) would raise a RuntimeError.
        with (folder / f"mp_rank_{rank:02d}_model_states.pt").open("wb") as states:
            torch.save(state, states)
        module.clear()
        for file in folder.glob(f"{scratch.name}-*"):
            file.unlink()
    (directory / "latest").write_text(TAG)


def _allocate(path: Path, size: int) -> None:
    """Create a file without holes: on a full disk, the kernel kills a process that writes into one through a map."""
    with path.open("wb") as file:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
