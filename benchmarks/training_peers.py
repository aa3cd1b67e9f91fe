"""The training steps that are compared: a group's, and the same in plain PyTorch, with one rank or several."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from btm_scale.config.layout import Layout
from btm_scale.config.model import ModelConfig
from btm_scale.config.training import OptimizerConfig
from btm_scale.model.shape import ModelShape
from btm_scale.train.jobs import TrainingJob

if TYPE_CHECKING:
    from btm_scale.train.engine import Engine

Step = Callable[[Tensor], object]


@dataclass(frozen=True)
class Case:
    """What is trained. A batch has `sequences` of `length` tokens, over all ranks."""

    preset: str
    ranks: int
    threads: int
    precision: str
    length: int
    vocabulary: int
    sequences: int
    micro_batch: int
    recompute: str = "none"
    float8: bool = False  # of ours

    @property
    def shape(self) -> ModelShape:
        """The model, with tied embeddings."""
        return ModelConfig(preset=self.preset).shape(self.vocabulary, self.length)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


def ours(case: Case) -> Step:
    """A step of the engine, as a group trains."""
    engine = engine_of(case)
    return lambda sequences: engine.step(sequences, 1e-3)


def engine_of(case: Case) -> Engine:
    """The DeepSpeed engine around the Megatron-core model."""
    from btm_scale.distributed.cpu import keep_freed_memory
    from btm_scale.distributed.group import ExpertGroup
    from btm_scale.model.gpt import build_model
    from btm_scale.train.engine import Engine

    keep_freed_memory()
    layout = Layout.model_validate(
        {
            "data": case.ranks,
            "precision": case.precision,
            "micro_batch": case.micro_batch,
            "recompute": case.recompute,
            "float8": case.float8,
        }
    )
    group = ExpertGroup.join(layout)
    job = TrainingJob(
        model="benchmark",
        branch=None,
        weights={},
        part=None,
        steps=1,
        sequences=case.sequences,
        batch_share=1.0,
        first_sample=0,
        samples=case.sequences,
        progress=(0.0, 1.0),
        layout=layout,
    )
    group.seed(0)
    model = build_model(
        case.shape,
        tensor=1,
        dtype=group.dtype,
        on_cpu=group.device.type == "cpu",
        recompute=layout.recompute,
        float8=layout.float8,
    )
    return Engine(group, model, job, OptimizerConfig(), {})


def plain(case: Case, *, keep_memory: bool = False, compiled: bool = False) -> Step:
    """The same in plain PyTorch; several ranks by DistributedDataParallel."""
    from plain_pytorch import PlainLoop

    from btm_scale.distributed.cpu import keep_freed_memory

    if keep_memory:
        keep_freed_memory()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if case.ranks > 1:
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    torch.manual_seed(0)
    loop = PlainLoop(case.shape, case.dtype, case.micro_batch, device, ranks=case.ranks, compiled=compiled)
    return loop.step


def seconds_a_step(case: Case, step: Step, steps: int, warm_up: int = 1) -> float:
    """Mean over `steps` steps after the warm-up steps. Every rank has its own part of the batch."""
    rank = int(os.environ["RANK"])
    torch.manual_seed(1 + rank)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (case.sequences // case.ranks, case.length + 1)
    sequences = torch.randint(0, case.vocabulary, shape).to(device)
    for _ in range(warm_up):
        step(sequences)
    _wait_for(device)
    begin = time.perf_counter()
    for _ in range(steps):
        step(sequences)
    _wait_for(device)
    return (time.perf_counter() - begin) / steps


def in_ranks(script: str | Path, case: Case, peer: str, options: list[str], **variables: str) -> dict[str, Any]:
    """Run `script --peer PEER` as fresh ranks on this machine and return the JSON that the first one printed last.

    `variables` are of the ranks' environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(case.ranks):
        where = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": case.ranks,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": case.threads,
        }
        ranks.append(
            subprocess.Popen(
                [sys.executable, str(script), *options, "--peer", peer],
                env=os.environ | {name: str(value) for name, value in where.items()} | variables,
                stdout=subprocess.PIPE,
                text=True,
            )
        )
    said = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a rank of '{peer}' failed; its message is above")
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return found


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
