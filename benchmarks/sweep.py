"""The dense baseline's batch size, learning rate and beta2, by successive halving, on dev perplexity.

Every point is trained for the seed's part of the schedule; the best continue to the end as the dense baseline.

    python benchmarks/sweep.py configs/eight_domains.yaml --set text_root=FOLDER \
        --points 16384:3e-3:0.95 8192:2e-3:0.98 --finalists 1 --out runs/sweep

Completed points are not trained again; points of an earlier sweep are kept in benchmarks/results/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from environment import describe

from btm_scale.config.run import RunConfig
from btm_scale.data.prepare import prepare
from btm_scale.forest.scores import Scores
from btm_scale.launch.local import LocalPool
from btm_scale.launch.supervise import GroupCommand, run_groups_in
from btm_scale.run.state import open_run
from btm_scale.run_dir import DENSE, SEED, RunDir
from btm_scale.train.jobs import training_job

RESULT = Path(__file__).parent / "results" / "sweep.json"


def main() -> None:
    """Train every point, two at a time, and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--points", nargs="+", required=True, metavar="BATCH_TOKENS:RATE:BETA2")
    parser.add_argument("--finalists", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    points = [tuple(point.split(":")) for point in options.points]
    runs = {(batch, rate, beta2): _open(options, batch, rate, beta2) for batch, rate, beta2 in points}
    _run_by_twos([_command(*runs[point], SEED) for point in points])
    points.sort(key=lambda point: _mean(_perplexity(*runs[point], SEED)))
    finalists = points[: options.finalists]
    _run_by_twos([_command(*runs[point], DENSE) for point in finalists])
    table = [_row(*runs[point], finished=point in finalists) for point in points]
    if options.result.is_file():
        measured = {_point(row) for row in table}
        earlier = json.loads(options.result.read_text())["points"]
        table += [row for row in earlier if _point(row) not in measured]
    table.sort(key=lambda row: (row["dense_mean_dev_perplexity"] or math.inf, row["seed_mean_dev_perplexity"]))
    options.result.parent.mkdir(exist_ok=True)
    result = {"environment": describe(), "config": options.config.name, "points": table}
    options.result.write_text(json.dumps(result, indent=2) + "\n")
    for row in table:
        print(row)


def _open(options: argparse.Namespace, batch: str, rate: str, beta2: str) -> tuple[RunConfig, RunDir]:
    changes = (
        *options.set,
        f"budget.batch_tokens={batch}",
        f"optimizer.lr={rate}",
        f"optimizer.betas=[0.9,{beta2}]",
        "evaluate.split=dev",
        "evaluate.tokens_per_domain=32768",
    )
    config = RunConfig.load(options.config, changes)
    run = RunDir(options.out.resolve() / f"{batch}-{rate}-{beta2}")
    shared = RunDir(options.out.resolve() / "shared")
    prepare(config, shared)
    run.root.mkdir(parents=True, exist_ok=True)
    for ours, theirs in ((run.data, shared.data), (run.tokenizer, shared.tokenizer)):
        if not ours.exists():
            ours.symlink_to(theirs)
    open_run(config, run)
    return config, run


def _run_by_twos(commands: Sequence[GroupCommand]) -> None:
    run_groups_in(LocalPool(slots=2, threads=1), commands, lambda states: None)


def _command(config: RunConfig, run: RunDir, model: str) -> GroupCommand:
    arguments = ("train", str(run.config), "--model", model, "--out", str(run.root))
    return GroupCommand(f"{run.root.name} {model}", training_job(config, model).layout.ranks, arguments, run.log(model))


def _perplexity(config: RunConfig, run: RunDir, model: str) -> dict[str, float]:
    scores = {domain: Scores.load(run.scores(model, domain, "dev")).log_probs for domain in config.domains}
    return {domain: math.exp(-float(log_probs.mean(dtype=np.float64))) for domain, log_probs in scores.items()}


def _mean(perplexity: dict[str, float]) -> float:
    return float(np.mean(list(perplexity.values())))


def _point(row: Mapping[str, Any]) -> tuple[float, float, float]:
    return row["batch_tokens"], row["lr"], row["beta2"]


def _row(config: RunConfig, run: RunDir, *, finished: bool) -> dict[str, Any]:
    return {
        "batch_tokens": config.budget.batch_tokens,
        "lr": config.optimizer.lr,
        "beta2": config.optimizer.betas[1],
        "seed_mean_dev_perplexity": _mean(_perplexity(config, run, SEED)),
        "dense_mean_dev_perplexity": _mean(_perplexity(config, run, DENSE)) if finished else None,
    }


if __name__ == "__main__":
    main()
