"""Training speed beside other work: one process with two threads alone, and two of them side by side on two cores.

    python benchmarks/beside.py [--rounds 6] [--seconds 3]

Each is measured with OpenMP's own waiting, in which threads spin, and as the command trains, with threads that sleep
(`wait_passively` in btm_scale/util/cores.py). All processes are started once and take turns in short windows, so that
other load meets all alike; ratios are of medians. Takes about 3 minutes on two idle cores. Writes results/beside.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from environment import describe
from training_peers import Case, ours

from btm_scale.launch.local import free_port
from btm_scale.util.cores import wait_passively

RESULT = Path(__file__).parent / "results" / "beside.json"
CASE = Case(
    preset="llama-1m",
    ranks=1,
    threads=2,
    precision="bf16",
    length=256,
    vocabulary=2048,
    sequences=16,
    micro_batch=8,
)
SPINNING, SLEEPING = "spinning", "sleeping"


class Trainer:
    """A process that trains when it is asked to."""

    def __init__(self, waiting: str) -> None:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
        }
        if waiting == SLEEPING:
            wait_passively(environment)
        places = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        places |= {"OMP_NUM_THREADS": CASE.threads}
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "--trainer"],
            env=environment | {name: str(value) for name, value in places.items()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def begin(self, seconds: float) -> None:
        """Let it train for this time."""
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)

    def rate(self) -> float:
        """Return the tokens per second of the training that was begun."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return float(json.loads(line)["tokens_per_second"])
        raise SystemExit("a process that trains has ended; its message is above")

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def train() -> None:
    """Train for as many seconds as each line of stdin says, and print the rate."""
    torch.set_num_threads(CASE.threads)
    step = ours(CASE)
    sequences = torch.randint(0, CASE.vocabulary, (CASE.sequences, CASE.length + 1))
    for line in sys.stdin:
        begin, steps = time.perf_counter(), 0
        while time.perf_counter() - begin < float(line):
            step(sequences)
            steps += 1
        rate = steps * CASE.sequences * CASE.length / (time.perf_counter() - begin)
        print(json.dumps({"tokens_per_second": rate}), flush=True)


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Return tokens per second by kind of waiting, alone and of both processes beside each other, and the ratios."""
    trainers = {waiting: (Trainer(waiting), Trainer(waiting)) for waiting in (SPINNING, SLEEPING)}
    try:
        for pair in trainers.values():
            for trainer in pair:  # one after the other: they start, and warm up
                trainer.begin(1.0)
                trainer.rate()
        alone: dict[str, list[float]] = {waiting: [] for waiting in trainers}
        beside: dict[str, list[list[float]]] = {waiting: [] for waiting in trainers}
        for _ in range(rounds):
            for waiting, (first, _) in trainers.items():
                first.begin(seconds)
                alone[waiting].append(first.rate())
            for waiting, pair in trainers.items():
                for trainer in pair:
                    trainer.begin(seconds)
                beside[waiting].append([trainer.rate() for trainer in pair])
    finally:
        for pair in trainers.values():
            for trainer in pair:
                trainer.end()
    usual = {waiting: statistics.median(rates) for waiting, rates in alone.items()}
    slower = {
        waiting: [statistics.median(one) for one in zip(*rates, strict=True)] for waiting, rates in beside.items()
    }
    return {
        "tokens_per_second": {"alone": alone, "beside": beside},
        "alone_to_spinning": usual[SLEEPING] / usual[SPINNING],
        "beside_to_alone": {waiting: [rate / usual[waiting] for rate in slower[waiting]] for waiting in trainers},
    }


def main() -> None:
    """Measure, print the ratios and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--result", type=Path, default=RESULT)
    parser.add_argument("--trainer", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        return train()
    result = {"environment": describe(), "case": asdict(CASE), "rounds": options.rounds, "seconds": options.seconds}
    sleeping: dict[str, str] = {}
    wait_passively(sleeping)
    result |= {"sleeping": sleeping} | measure(options.rounds, options.seconds)
    print({name: result[name] for name in ("alone_to_spinning", "beside_to_alone")})
    options.result.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
