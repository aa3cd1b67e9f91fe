"""Training speed of a group on CPU beside plain PyTorch of the same architecture, batch and precision.

    python benchmarks/train.py [--rounds 3] [--older FOLDER]

One rank of two small models beside a plain loop, and two data ranks beside DistributedDataParallel with the same
threads. Peers run in turn, each time in fresh processes, and a ratio is the median of those of the rounds, because the
speed of a shared machine drifts. Our ranks set malloc to keep freed memory (`keep_freed_memory` in
btm_scale/distributed/cpu.py), so a second variant of each peer does the same. With --older, our group in an older
checkout of this repository is one more peer. Writes results/train.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from environment import describe
from training_peers import Case, in_ranks, ours, plain, seconds_a_step

RESULT = Path(__file__).parent / "results" / "train.json"
OURS, PLAIN, KEPT, OLDER = "ours", "plain", "plain, memory kept", "older"
COMMON = {"precision": "bf16", "length": 256, "vocabulary": 4096, "micro_batch": 8}
CASES = {
    "llama-4m, one rank": Case(preset="llama-4m", ranks=1, threads=2, sequences=64, **COMMON),
    "llama-30m, one rank": Case(preset="llama-30m", ranks=1, threads=2, sequences=16, **COMMON),
    "llama-4m, two data ranks": Case(preset="llama-4m", ranks=2, threads=1, sequences=64, **COMMON),
    "llama-30m, two data ranks": Case(preset="llama-30m", ranks=2, threads=1, sequences=32, **COMMON),
}


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=CASES, action="append", help="only this one; may be given often")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--peer", choices=(OURS, PLAIN, KEPT), help=argparse.SUPPRESS)
    parser.add_argument("--older", type=Path, metavar="FOLDER", help="an older checkout of this repository")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    names = options.case or list(CASES)
    if options.peer:
        case = CASES[names[0]]
        torch.set_num_threads(case.threads)
        step = ours(case) if options.peer == OURS else plain(case, keep_memory=options.peer == KEPT)
        seconds = seconds_a_step(case, step, options.steps)
        print(json.dumps({"tokens_per_second": case.sequences * case.length / seconds}))
        return
    environment = describe()
    rows = {name: measured(name, options) for name in names}
    options.result.parent.mkdir(exist_ok=True)
    result = {"environment": environment, "rounds": options.rounds, "steps": options.steps, "cases": rows}
    if options.older:
        command = ["git", "-C", str(options.older), "rev-parse", "--short", "HEAD"]
        result["older_commit"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    options.result.write_text(json.dumps(result, indent=2) + "\n")


def measured(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of every peer by round, and the ratios of ours to them."""
    peers = (OURS, PLAIN, KEPT, OLDER) if options.older else (OURS, PLAIN, KEPT)
    speeds: dict[str, list[float]] = {peer: [] for peer in peers}
    words = ["--case", name, "--steps", str(options.steps)]
    for _ in range(options.rounds):
        for peer, found in speeds.items():
            if peer == OLDER:
                script = options.older.resolve() / "benchmarks" / "train.py"
                figures = in_ranks(script, CASES[name], OURS, words, PYTHONPATH=str(options.older.resolve()))
            else:
                figures = in_ranks(__file__, CASES[name], peer, words)
            found.append(figures["tokens_per_second"])
    ratios = {
        peer: statistics.median(mine / other for mine, other in zip(speeds[OURS], speeds[peer], strict=True))
        for peer in peers[1:]
    }
    print(name, {peer: round(statistics.median(found)) for peer, found in speeds.items()}, ratios, flush=True)
    return {"case": asdict(CASES[name]), "tokens_per_second": speeds, "ratio_to": ratios}


if __name__ == "__main__":
    main()
