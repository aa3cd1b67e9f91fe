"""Two ranks that each see their own folder of checkpoints, as two hosts of a shared file system may temporarily."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist
from helpers.worlds import fork_world, read_spec

from btm_scale.train.checkpoint import common_state


def find(folders: list[str]) -> None:
    dist.init_process_group("gloo")
    folder = Path(folders[int(os.environ["RANK"])])
    (folder / "found").write_text(str(common_state(folder)))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    fork_world(2, find, read_spec())
