"""Separate documents: the time of a training step beside that of causal attention, and the work of data ranks.

    python benchmarks/packed.py [--rounds 5]

Steps of one rank in this process, on the same tokens, in turn with attention across documents and within them; ratios
are of medians. From the times of long and short documents follows c, the number of tokens that cost as much as all
other work of a token: the work of a sequence is the sum of its documents' squared lengths, and c for each token.
The work of data ranks is that of random documents, whose lengths are lognormal. Writes results/packed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from environment import describe
from training_peers import Case, engine_of

from btm_scale.launch.local import free_port
from btm_scale.train.balance import balanced
from btm_scale.train.engine import Engine

RESULT = Path(__file__).parent / "results" / "packed.json"
END, LENGTH = 2, 2048
CASE = Case(
    preset="llama-4m",
    ranks=1,
    threads=2,
    precision="bf16",
    length=LENGTH,
    vocabulary=4096,
    sequences=4,
    micro_batch=2,
)
MEANS = (300, LENGTH)  # the mean length of documents; LENGTH: each sequence is one
CAUSAL, SEPARATE = "causal", "separate"

# The work of data ranks.
MEDIAN, SIGMA = 400, 1.5
RANK_LENGTH, RANKS, RANK_SEQUENCES, STEPS = 8192, 8, 16, 200


def main() -> None:
    """Measure every case and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", action="store_true", help="only the work of data ranks, which is counted in seconds")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    result = {"environment": describe(), "case": asdict(CASE), "imbalance": {"attention alone": imbalance(0.0)}}
    if not options.work:
        result |= timed(options.rounds)
        result["imbalance"]["c"] = imbalance(result["other_work_tokens"])
    options.result.parent.mkdir(exist_ok=True)
    options.result.write_text(json.dumps(result, indent=2) + "\n")
    for name, figures in result.get("steps", {}).items():
        print(name, f"{figures['ratio']:.3f}")
    print(result["imbalance"])


def timed(rounds: int) -> dict[str, Any]:
    """The times of steps, and c from them."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    os.environ.update({name: str(value) for name, value in alone.items()})
    torch.set_num_threads(CASE.threads)
    engine = engine_of(CASE)
    steps = {f"documents of {mean}": measured(engine, documents(mean), rounds) for mean in MEANS}
    return {"rounds": rounds, "steps": steps, "other_work_tokens": other_work(engine, rounds)}


def documents(mean: int) -> torch.Tensor:
    """Random tokens with documents of exponential lengths; int64 [sequences, length + 1]."""
    draw = torch.Generator().manual_seed(mean)
    tokens = torch.randint(END + 1, CASE.vocabulary, (CASE.sequences, LENGTH + 1), generator=draw)
    if mean < LENGTH:
        tokens[torch.rand(tokens.shape, generator=draw) < 1 / mean] = END
    return tokens


def equal_documents(length: int) -> torch.Tensor:
    """Random tokens with documents of one length."""
    tokens = documents(LENGTH)
    tokens[:, length - 1 :: length] = END
    return tokens


def measured(engine: Engine, sequences: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Seconds of a step in each mode by round, and the ratio of separate documents to causal attention."""
    seconds: dict[str, list[float]] = {CAUSAL: [], SEPARATE: []}
    for number in range(rounds + 1):
        for mode, found in seconds.items():
            took = seconds_of_step(engine, sequences, separate=mode == SEPARATE)
            if number:  # the first is a warm-up
                found.append(took)
    medians = {mode: statistics.median(found) for mode, found in seconds.items()}
    return {"seconds": seconds, "ratio": medians[SEPARATE] / medians[CAUSAL]}


def seconds_of_step(engine: Engine, sequences: torch.Tensor, *, separate: bool) -> float:
    """Seconds of one optimizer step."""
    engine.model.end_of_text = END if separate else None
    begin = time.perf_counter()
    engine.step(sequences, 1e-3)
    return time.perf_counter() - begin


def other_work(engine: Engine, rounds: int) -> float:
    """The tokens that a query must attend to until that costs as much as all other work of a token.

    With documents of n tokens, a step of a sequence of L takes a (L n + c L).
    """
    short, long = LENGTH // 16, LENGTH
    times = {}
    for length in (short, long):
        sequences = equal_documents(length)
        found = [seconds_of_step(engine, sequences, separate=True) for _ in range(rounds + 1)]
        times[length] = statistics.median(found[1:])
    attention = (times[long] - times[short]) / (long - short)  # per token of a document's length
    return times[short] / attention - short


def imbalance(c: float) -> dict[str, Any]:
    """The work of the most loaded data rank over the mean, in each step: its mean and its maximum over all steps.

    `text order` gives each rank the sequences that follow one another, as without separate documents.
    """
    found: dict[str, list[float]] = {"text order": [], "balanced": []}
    for squares in work_of_steps():
        shares = {
            "text order": np.arange(RANKS * RANK_SEQUENCES).reshape(RANKS, -1).tolist(),
            "balanced": balanced(squares.tolist(), RANKS),
        }
        work = squares + c * RANK_LENGTH
        for name, parts in shares.items():
            totals = np.array([work[part].sum() for part in parts])
            found[name].append(float(totals.max() / totals.mean()))
    return {name: {"mean": float(np.mean(values)), "max": max(values)} for name, values in found.items()}


def work_of_steps() -> np.ndarray[Any, Any]:
    """The sums of squared lengths of the documents that fill each sequence, [steps, sequences of a step]."""
    draw = np.random.RandomState(1)
    sequences = STEPS * RANKS * RANK_SEQUENCES
    tokens = sequences * RANK_LENGTH
    ends = np.cumsum(np.ceil(draw.lognormal(np.log(MEDIAN), SIGMA, size=tokens // MEDIAN)))
    ends = np.union1d(ends[ends < tokens], np.arange(0, tokens + 1, RANK_LENGTH)).astype(np.int64)
    squares = np.bincount(ends[:-1] // RANK_LENGTH, np.diff(ends).astype(np.float64) ** 2)
    return squares.reshape(STEPS, -1)


if __name__ == "__main__":
    main()
