"""ExpertGroup: the torch.distributed world of one expert, with its tensor, context and data ranks and its random state.

All training, scoring and generation runs inside a group and never communicates beyond it. This is the only file that
touches Megatron-core's global process groups.
"""

from __future__ import annotations

import gc
import logging
import os
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist

from btm_scale.config.layout import Layout
from btm_scale.distributed.cpu import leave_out_shared_memory_op, replace_cuda
from btm_scale.distributed.gpu_settings import set_gpu_defaults
from btm_scale.distributed.precision import Precision, require_possible
from btm_scale.distributed.rendezvous import TIMEOUT, init_process_group
from btm_scale.distributed.shared_groups import shared_groups
from btm_scale.errors import LaunchError
from btm_scale.kernels import kernel_path
from btm_scale.util.device_query import name_of
from btm_scale.util.devices import DEVICE, Device, hide_gpus_if_on_cpu, usable_gpus
from btm_scale.util.imports import import_uncompiled

hide_gpus_if_on_cpu("auto")  # as the launcher chose; before anything uses CUDA
import_uncompiled("megatron.core")  # before other modules do

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class ExpertGroup:
    """The world of one expert. Create it with `ExpertGroup.join`; a process is in one group at a time."""

    layout: Layout
    rank: int
    size: int
    device: torch.device
    # The ranks that share this rank's sequences; None if there is only this rank.
    context_group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, layout: Layout, on: Device = "auto") -> ExpertGroup:
        """Join the group's other ranks at the rendezvous that the launcher set in the environment.

        `on` is launch.device. Raises LaunchError if the number of ranks is not the layout's, if the device cannot train
        in its precision, if this host has no GPU for this rank, and as `usable_gpus` does.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size != layout.ranks:
            raise LaunchError(
                f"This group has {size} ranks, but its layout needs {layout.degrees} = {layout.ranks}. "
                f"Start {layout.ranks} ranks, or change `layout`."
            )
        set_gpu_defaults(layout)
        gpus = usable_gpus(on, in_this_process=True)
        has_gpu = bool(gpus.names)
        if not has_gpu:
            replace_cuda()
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        if size == 1:
            os.environ.setdefault("MASTER_PORT", "0")  # any that is free
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        device = torch.device("cpu")
        if has_gpu:
            device = torch.device("cuda", require_own_gpu(torch.cuda.device_count()))
        import deepspeed
        from megatron.core import parallel_state

        if has_gpu:
            torch.cuda.set_device(device)
        require_possible(layout.precision)
        if not dist.is_initialized():
            if not has_gpu:
                leave_out_shared_memory_op()
            backend = "nccl" if has_gpu else "gloo"
            init_process_group(backend, own_gpu=_identity(device) if has_gpu else "")
            deepspeed.init_distributed(dist_backend=backend, verbose=False)
        # To Megatron-core and DeepSpeed, context ranks are data ranks: ZeRO shards over them, and gradients are
        # averaged over them.
        with shared_groups(parallel_state):
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=layout.tensor)
        _require_grid(layout, parallel_state)
        # Imported objects are never garbage; otherwise DeepSpeed's start collects over them six times.
        gc.freeze()
        why = f" ({gpus.reason})" if gpus.reason and DEVICE not in os.environ else ""  # else its launcher says why
        logger.info("device: %s%s; kernels: %s; ranks: %d", name_of(device), why, kernel_path(device), size)
        return cls(layout, dist.get_rank(), size, device, _own_group(layout, "context"))

    @property
    def tensor_rank(self) -> int:
        """This rank's index among the ranks that share every weight matrix."""
        return self.layout.coordinates(self.rank)["tensor"]

    @property
    def data_rank(self) -> int:
        """This rank's index among the ranks that share every batch by sequences; context ranks have the same."""
        return self.layout.coordinates(self.rank)["data"]

    @property
    def replica_rank(self) -> int:
        """This rank's index among the `layout.replicas` ranks with the same weights, in `replica_group`."""
        return self.rank // self.layout.tensor

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """The ranks with the same weights: DeepSpeed's data parallel group, the context and data ranks."""
        from megatron.core import parallel_state

        group: dist.ProcessGroup = parallel_state.get_data_parallel_group()
        return group

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the group's files."""
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and activations. The layout's precision must be resolved."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.layout.precision]

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's weight matrices; None if there is only this rank."""
        from megatron.core import parallel_state

        return parallel_state.get_tensor_model_parallel_group() if self.layout.tensor > 1 else None

    @property
    def mpu(self) -> Any:
        """Megatron-core's process groups under the names that DeepSpeed expects."""
        from megatron.core import parallel_state

        return _ModelParallelUnit(parallel_state)

    def alone(self) -> Any:
        """Return `mpu` with this rank as the only data rank. All ranks call this together."""
        own = [dist.new_group([rank]) for rank in range(self.size)][self.rank]
        unit = self.mpu
        unit.get_data_parallel_rank = lambda: 0
        unit.get_data_parallel_world_size = lambda: 1
        unit.get_data_parallel_group = lambda: own
        return unit

    def seed(self, random_seed: int) -> None:
        """Seed every random number generator of this process, equally on every rank."""
        random.seed(random_seed)
        np.random.seed(random_seed)
        torch.manual_seed(random_seed)

    def in_precision(self, precision: Precision) -> ExpertGroup:
        """Return this group with the given precision. Raises LaunchError if the device cannot train in it."""
        require_possible(precision)
        return replace(self, layout=self.layout.model_copy(update={"precision": precision}))

    def decided(self, decide: Callable[[], T]) -> T:
        """Return what the first rank decides from files. All ranks call this together.

        A rank that reads them later, or on another host, may find others.
        """
        decision = [decide() if self.is_first else None]
        dist.broadcast_object_list(decision, src=0)
        return cast(T, decision[0])

    def leave(self) -> None:
        """Destroy the process groups."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def require_own_gpu(visible: int) -> int:
    """Return LOCAL_RANK, the number of this rank's GPU. Raises LaunchError if fewer GPUs are visible."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if local_rank >= visible:
        raise LaunchError(
            f"Rank {os.environ['RANK']} on {socket.gethostname()} has LOCAL_RANK {local_rank}, and sees {visible} "
            f"GPU{'s' if visible != 1 else ''}. Each rank of a host needs its own: start at most {visible} per host "
            "(launch.slurm.ranks_per_node, launch.mpi.ranks, or slots in the hostfile), or make more GPUs visible."
        )
    return local_rank


def _identity(device: torch.device) -> str:
    """Return a name that no other GPU has; empty if the driver reports none."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", "")
    return f"{uuid}" if uuid else ""


class _ModelParallelUnit:
    """A model parallel unit, DeepSpeed's `mpu`."""

    def __init__(self, state: Any) -> None:
        self.get_model_parallel_rank = state.get_tensor_model_parallel_rank
        self.get_model_parallel_world_size = state.get_tensor_model_parallel_world_size
        self.get_model_parallel_group = state.get_tensor_model_parallel_group
        self.get_tensor_model_parallel_rank = state.get_tensor_model_parallel_rank
        self.get_tensor_model_parallel_world_size = state.get_tensor_model_parallel_world_size
        self.get_tensor_model_parallel_group = state.get_tensor_model_parallel_group
        self.get_data_parallel_rank = state.get_data_parallel_rank
        self.get_data_parallel_world_size = state.get_data_parallel_world_size
        self.get_data_parallel_group = state.get_data_parallel_group


def _own_group(layout: Layout, axis: str) -> dist.ProcessGroup | None:
    """Return this rank's process group along an axis; None of one rank. All ranks call this together."""
    if layout.grid[axis] == 1:
        return None
    groups = {ranks: dist.new_group(list(ranks), timeout=TIMEOUT) for ranks in layout.peers(axis)}
    return next(group for ranks, group in groups.items() if dist.get_rank() in ranks)


def _require_grid(layout: Layout, state: Any) -> None:
    """Check that the process groups, which Megatron-core creates for its layers, are those of the layout's grid."""
    rank = dist.get_rank()
    replicas = tuple(range(rank % layout.tensor, layout.ranks, layout.tensor))
    tensor = next(ranks for ranks in layout.peers("tensor") if rank in ranks)
    expected = ((state.get_tensor_model_parallel_group(), tensor), (state.get_data_parallel_group(), replicas))
    for group, ranks in expected:
        assert tuple(dist.get_process_group_ranks(group)) == ranks, f"{group} is not {ranks}"
