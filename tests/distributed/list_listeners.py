"""A group of two ranks on this host that reports the addresses on which its processes listen."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from helpers.worlds import fork_world, read_spec

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup


def report(folder: str) -> None:
    group = ExpertGroup.join(Layout(data=2, zero=1, precision="fp32"))
    dist.all_reduce(torch.ones(1))
    connections = psutil.Process(os.getpid()).net_connections("inet")
    listening = [place.laddr.ip for place in connections if place.status == psutil.CONN_LISTEN]
    (Path(folder) / f"{group.rank}.json").write_text(json.dumps(listening))
    dist.barrier()


if __name__ == "__main__":
    fork_world(2, report, read_spec())
