"""Model FLOPs utilization of a training step, with products in float8 too, beside plain PyTorch and torch.compile.

    python benchmarks/train_gpu.py [--preset llama-1.3b] [--sequences 32] [--micro-batch 4]
    python benchmarks/train_gpu.py --small        # on any machine: checks that it runs

Utilization: FLOPs of forward and backward pass (without recomputation) over the data sheet's peak in this precision.
Peers run in turn, each time in a fresh process. Writes results/train_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from environment import describe
from training_peers import Case, in_ranks, ours, plain, seconds_a_step

from btm_scale.train.metrics import peak_flops

RESULT = Path(__file__).parent / "results" / "train_gpu.json"
OURS, FLOAT8, PLAIN, COMPILED = "ours", "ours, float8", "plain", "plain, compiled"
PEERS = (OURS, FLOAT8, PLAIN, COMPILED)
SMALL = [
    "--preset",
    "llama-1m",
    "--length",
    "64",
    "--sequences",
    "4",
    "--micro-batch",
    "2",
    "--rounds",
    "1",
    "--steps",
    "2",
]


def main() -> None:
    """Measure every peer in turn and write the table."""
    options = _options()
    case = Case(
        preset=options.preset,
        ranks=1,
        threads=options.threads,
        precision="bf16",
        length=options.length,
        vocabulary=options.vocabulary,
        sequences=options.sequences,
        micro_batch=options.micro_batch,
        recompute=options.recompute,
    )
    if options.peer:
        print(json.dumps(measured(case, options)))
        return
    if not torch.cuda.is_available() and not options.small:
        raise SystemExit("no GPU here; --small shows that the script runs, and writes nothing")
    environment = describe()
    rounds: dict[str, list[dict[str, Any]]] = {peer: [] for peer in PEERS}
    words = [
        f"--{name.replace('_', '-')}={getattr(options, name)}"
        for name in ("preset", "length", "vocabulary", "sequences", "micro_batch", "recompute", "steps")
    ]
    for _ in range(options.rounds):
        for peer, found in rounds.items():
            found.append(in_ranks(__file__, case, peer, words))
    peers = {
        peer: {
            name: statistics.median(run[name] for run in runs) if runs[0][name] is not None else None
            for name in runs[0]
        }
        for peer, runs in rounds.items()
    }
    for figures in peers.values():
        figures["speed_of_ours"] = peers[OURS]["tokens_per_second"] / figures["tokens_per_second"]
    print(json.dumps(peers, indent=2))
    if not options.small:
        result = {"environment": environment, "case": asdict(case), "peers": peers, "rounds": rounds}
        options.result.write_text(json.dumps(result, indent=2) + "\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="llama-1.3b")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--recompute", default="none", choices=["none", "selective", "full"], help="ours only")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a tiny model, on whatever there is")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, default=RESULT)
    small = parser.parse_args().small
    options = parser.parse_args(SMALL) if small else parser.parse_args()
    options.small = small
    return options


def measured(case: Case, options: argparse.Namespace) -> dict[str, float | None]:
    """One peer's speed and memory, after warm-up steps that compile and tune kernels."""
    if options.peer in (OURS, FLOAT8):
        step = ours(replace(case, float8=options.peer == FLOAT8))
    else:
        step = plain(case, compiled=options.peer == COMPILED)
    seconds = seconds_a_step(case, step, options.steps, warm_up=3)
    tokens = case.sequences * case.length
    on_gpu = torch.cuda.is_available()
    peak = peak_flops(torch.device("cuda", 0), case.precision) if on_gpu else None
    flops = case.shape.flops_per_token(case.length) * tokens / seconds
    return {
        "tokens_per_second": tokens / seconds,
        "model_flops_utilisation": flops / peak if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }


if __name__ == "__main__":
    main()
