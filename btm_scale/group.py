"""ExpertGroup: the world of one expert, its tensor and data ranks, its random state.

Everything that trains, scores or generates runs inside one; nothing in it reaches beyond it. This is the only file that
touches Megatron-core's global process groups.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from btm_scale.config import GroupConfig
from btm_scale.errors import LaunchError


@dataclass(frozen=True)
class ExpertGroup:
    """One world. Make it with `ExpertGroup.join`; a process is in one at a time."""

    config: GroupConfig
    rank: int
    size: int
    device: torch.device

    @classmethod
    def join(cls, config: GroupConfig) -> ExpertGroup:
        """Meet the group's other ranks at the rendezvous that the launcher put into the environment.

        Raises LaunchError if the number of ranks isn't the layout's.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size != config.ranks:
            raise LaunchError(
                f"this group has {size} ranks, but its layout needs tensor {config.tensor} x data {config.data} = "
                f"{config.ranks}; start {config.ranks} ranks or change `group`"
            )
        has_gpu = torch.cuda.is_available()
        if not has_gpu:
            _stand_in_for_cuda()
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        os.environ.setdefault("RANK", "0")
        os.environ.setdefault("LOCAL_RANK", "0")
        os.environ.setdefault("WORLD_SIZE", "1")
        import deepspeed
        from megatron.core import parallel_state

        device = torch.device("cpu")
        if has_gpu:
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            if not has_gpu:
                _build_shared_memory_op()
            deepspeed.init_distributed(dist_backend="nccl" if has_gpu else "gloo", verbose=False)
            if not has_gpu:
                _unname_shared_memory()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=config.tensor)
        # What the imports made is no garbage: DeepSpeed's start looks through it six times otherwise.
        gc.freeze()
        return cls(config, dist.get_rank(), size, device)

    @property
    def tensor_rank(self) -> int:
        """This rank's place among those that share every weight matrix."""
        return self.rank % self.config.tensor

    @property
    def data_rank(self) -> int:
        """This rank's place among those that share every batch."""
        return self.rank // self.config.tensor

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what the group writes once."""
        return self.rank == 0

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and activations."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.config.precision]

    @property
    def tensor_group(self) -> dist.ProcessGroup | None:
        """The ranks that share this rank's weight matrices; None where there is only this one."""
        from megatron.core import parallel_state

        return parallel_state.get_tensor_model_parallel_group() if self.config.tensor > 1 else None

    @property
    def mpu(self) -> Any:
        """Megatron-core's process groups under the names that DeepSpeed asks for."""
        from megatron.core import parallel_state

        return _ModelParallelUnit(parallel_state)

    def alone(self) -> Any:
        """The same, but with no data rank beside this one. All ranks make it together."""
        own = [dist.new_group([rank]) for rank in range(self.size)][self.rank]
        unit = self.mpu
        unit.get_data_parallel_rank = lambda: 0
        unit.get_data_parallel_world_size = lambda: 1
        unit.get_data_parallel_group = lambda: own
        return unit

    def seed(self, random_seed: int) -> None:
        """Start every random number generator of this process anew, alike on every rank."""
        random.seed(random_seed)
        np.random.seed(random_seed)
        torch.manual_seed(random_seed)

    def rejoin(self, config: GroupConfig) -> ExpertGroup:
        """The same ranks in another layout of as many; this group is over."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        return ExpertGroup.join(config)

    def leave(self) -> None:
        """End the world."""
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


class _ModelParallelUnit:
    """What DeepSpeed calls an mpu."""

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


def _build_shared_memory_op() -> None:
    """Compile and load DeepSpeed's shared-memory operator, which its gloo backend wants; minutes once, then no time.

    torch guards the build by a file that a killed build leaves behind, for which every later one would wait for
    ever. Our ranks build in a folder of their own, under a lock that the kernel lets go of, so whoever holds it may
    remove that file.
    """
    import deepspeed

    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    # This environment's ninja, whatever the shell finds first: another version would build everything anew.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    builder = deepspeed.get_accelerator().create_op_builder("ShareMemCommBuilder")
    with (folder / "building").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (folder / builder.name / "lock").unlink(missing_ok=True)
        builder.load(verbose=False)


def _unname_shared_memory() -> None:
    """Take the name from this rank's 69 MB of shared memory, once every rank has mapped it.

    The operator never does, so that without this each group, killed or not, would leave them in memory for ever.
    """
    dist.barrier()
    rendezvous = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{rendezvous}_{dist.get_rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def extensions_folder() -> Path:
    """Where this environment's operators are built; another Python or torch has another folder."""
    environment = hashlib.sha256(f"{sys.prefix} {torch.__version__}".encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "btm-scale" / f"extensions-{environment}"


def _stand_in_for_cuda() -> None:
    """Let Megatron-core, which asks CUDA for its device in places, run where there is no GPU."""
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
