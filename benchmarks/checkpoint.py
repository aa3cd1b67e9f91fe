"""Time of saving a training checkpoint by one rank and by two, on a file system in memory.

    python benchmarks/checkpoint.py [--rounds 5] [--zero 0] [--folder /dev/shm]

The groups take turns, each time in fresh processes; a save's time is the smallest of several, and ratios are of
medians: of the time that passes and, less disturbed by other programs, of the processor time of the busier rank.
Storage is as fast as memory, so what is measured is hashing and writing. Without ZeRO every rank has the complete state
and writes half of it; with ZeRO it writes its partition. Prints JSON, or writes it to --out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from environment import describe
from training_peers import Case, in_ranks

from btm_scale.config.layout import Layout
from btm_scale.config.training import OptimizerConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.train.build import new_model
from btm_scale.train.checkpoint import save_state
from btm_scale.train.engine import Engine
from btm_scale.train.jobs import TrainingJob

SAVES = 5


def main() -> None:
    """Measure both groups in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--zero", type=int, default=0, choices=(0, 1, 2, 3))
    parser.add_argument("--preset", default="llama-30m")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(save(options, int(options.peer))))
        return
    rows: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    given = ["--zero", str(options.zero), "--preset", options.preset, "--folder", str(options.folder)]
    for _ in range(options.rounds):
        for ranks, measured in rows.items():
            measured.append(in_ranks(__file__, case(options.preset, ranks), str(ranks), given))
    result: dict[str, Any] = {"environment": describe(), "zero": options.zero, "ranks": rows}
    for name in ("seconds", "processor_seconds"):
        one, two = (statistics.median(row[name] for row in rows[ranks]) for ranks in rows)
        result[f"ratio_of_{name}"] = two / one
    text = json.dumps(result, indent=2) + "\n"
    if options.out is None:
        print(text)
    else:
        options.out.write_text(text)


def case(preset: str, ranks: int) -> Case:
    """A group of `ranks` data ranks with one thread each."""
    sizes = {"length": 64, "vocabulary": 4096, "sequences": 2, "micro_batch": 1}
    return Case(preset=preset, ranks=ranks, threads=1, precision="bf16", **sizes)


def save(options: argparse.Namespace, ranks: int) -> dict[str, float]:
    """Save a new model's state several times, as one rank of the group."""
    torch.set_num_threads(1)
    layout = Layout(data=ranks, zero=options.zero, precision="bf16", micro_batch=1)
    group = ExpertGroup.join(layout)
    shape = case(options.preset, ranks).shape
    job = TrainingJob(
        model="benchmark",
        branch=None,
        weights={},
        part=None,
        steps=1,
        sequences=2,
        batch_share=1.0,
        first_sample=0,
        samples=2,
        progress=(0.0, 1.0),
        layout=layout,
    )
    model = new_model(group, shape, job, OptimizerConfig(), {})
    engine = Engine(group, model, job, OptimizerConfig(), {})
    times, busy = [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as own:
        shared = [own]
        torch.distributed.broadcast_object_list(shared, src=0)
        for step in range(1, SAVES + 1):
            torch.distributed.barrier()
            begin, began = time.perf_counter(), time.process_time()
            save_state(engine, Path(shared[0]), step, keep=1)
            times.append(time.perf_counter() - begin)
            busy.append(time.process_time() - began)
        torch.distributed.barrier()
    busiest = torch.tensor(min(busy))
    torch.distributed.all_reduce(busiest, torch.distributed.ReduceOp.MAX)
    group.leave()
    return {"seconds": min(times), "processor_seconds": float(busiest), "bytes": 12 * shape.parameters}


if __name__ == "__main__":
    main()
