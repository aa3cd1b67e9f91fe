"""Training speed of a group of one beside a plain PyTorch loop of the same architecture, batch and precision.

    python benchmarks/train.py [--preset llama-4m] [--rounds 3]

The two run in turn, each time in a fresh process; the ratio is of medians. Our group keeps freed memory (see
train/worker.py); since the plain loop could be told to do the same, a second peer does. Writes results/train.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from environment import describe

from btm_scale.config import GroupConfig, ModelConfig, OptimizerConfig
from btm_scale.train.job import TrainingJob

RESULT = Path(__file__).parent / "results" / "train.json"
PEERS = ("ours", "plain", "plain, memory kept")
LENGTH, VOCABULARY = 256, 4096


def main() -> None:
    """Measure every peer in turn and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="llama-4m")
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peer", choices=PEERS, help="measure one peer in this process and print tokens/s")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.peer:
        print(json.dumps(measure(options)))
        return
    speeds: dict[str, list[float]] = {peer: [] for peer in PEERS}
    for _ in range(options.rounds):
        for peer in PEERS:
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--peer", peer], stdout=subprocess.PIPE, check=True
            )
            speeds[peer].append(float(done.stdout.splitlines()[-1]))
    medians = {peer: statistics.median(values) for peer, values in speeds.items()}
    result = {
        "environment": describe(),
        "settings": {name: value for name, value in vars(options).items() if name not in ("peer", "result")},
        "tokens_per_second": speeds,
        "ratio_to_plain": medians["ours"] / medians["plain"],
        "ratio_to_plain_memory_kept": medians["ours"] / medians["plain, memory kept"],
    }
    options.result.parent.mkdir(exist_ok=True)
    options.result.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({peer: round(value) for peer, value in medians.items()}, indent=2))
    print(
        f"ours / plain: {result['ratio_to_plain']:.3f}, memory kept in both: {result['ratio_to_plain_memory_kept']:.3f}"
    )


def measure(options: argparse.Namespace) -> float:
    """Tokens a second of one peer, over `steps` steps after a warm-up step."""
    torch.set_num_threads(options.threads)
    step = ours(options) if options.peer == "ours" else plain(options)
    torch.manual_seed(0)
    sequences = torch.randint(0, VOCABULARY, (options.sequences, LENGTH + 1))
    step(sequences)
    begin = time.perf_counter()
    for _ in range(options.steps):
        step(sequences)
    return options.steps * options.sequences * LENGTH / (time.perf_counter() - begin)


def ours(options: argparse.Namespace) -> Callable[[torch.Tensor], object]:
    """The DeepSpeed engine around the Megatron-core model, as a group trains it."""
    from btm_scale.group import ExpertGroup
    from btm_scale.model.gpt import build_model
    from btm_scale.train.engine import Engine
    from btm_scale.train.worker import keep_freed_memory

    keep_freed_memory()
    layout = GroupConfig(precision=options.precision, micro_batch=options.micro_batch)
    group = ExpertGroup.join(layout)
    job = TrainingJob(
        model="benchmark", branch=None, weights={}, part=None, steps=options.steps, sequences=options.sequences,
        batch_share=1.0, first_sample=0, samples=options.sequences, progress=(0.0, 1.0), group=layout,
    )  # fmt: skip
    shape = ModelConfig(preset=options.preset).shape(VOCABULARY, LENGTH)
    group.seed(0)
    model = build_model(shape, tensor=1, dtype=group.dtype, on_cpu=group.device.type == "cpu")
    engine = Engine(group, model, job, OptimizerConfig(), {})
    return lambda sequences: engine.step(sequences, 1e-3)


def plain(options: argparse.Namespace) -> Callable[[torch.Tensor], object]:
    """The same in plain PyTorch."""
    from plain_pytorch import PlainLoop

    from btm_scale.train.worker import keep_freed_memory

    if options.peer == "plain, memory kept":
        keep_freed_memory()
    shape = ModelConfig(preset=options.preset).shape(VOCABULARY, LENGTH)
    dtype = torch.bfloat16 if options.precision == "bf16" else torch.float32
    return PlainLoop(shape, dtype, options.micro_batch).step


if __name__ == "__main__":
    main()
