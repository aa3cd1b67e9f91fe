"""A group of two ranks on this host that reports where its processes listen, its process groups, and a decision."""

from __future__ import annotations

import json
import os
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
from helpers.worlds import fork_world, read_spec
from megatron.core import parallel_state

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup


def report(folder: str) -> None:
    group = ExpertGroup.join(Layout(data=2, zero=1, precision="fp32"))
    dist.all_reduce(torch.ones(1))
    connections = psutil.Process(os.getpid()).net_connections("inet")
    listening = [place.laddr.ip for place in connections if place.status == psutil.CONN_LISTEN]
    groups = [dist.get_process_group_ranks(one) for one in parallel_state._global_process_group_list[1:]]
    found = {"listening": listening, "groups": groups, "decided": group.decided(lambda: group.rank)}
    (Path(folder) / f"{group.rank}.json").write_text(json.dumps(found))
    dist.barrier()


if __name__ == "__main__":
    fork_world(2, report, read_spec())
