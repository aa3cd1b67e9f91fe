"""The dense baseline's batch size and learning rate: a grid, each point trained in full and judged on dev text.

    python benchmarks/sweep.py configs/eight_domains.yaml --set text_root=FOLDER \
        --points 16384:3e-3 8192:2e-3 --out runs/sweep

Points that are done are not trained again. Writes benchmarks/results/sweep.json.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import numpy as np
from environment import describe

from btm_scale.config import RunConfig
from btm_scale.data.prepare import prepare
from btm_scale.forest.scoring import Scores
from btm_scale.launch.local import GroupCommand, run_groups
from btm_scale.pipeline import open_run
from btm_scale.run_dir import DENSE, SEED, RunDir
from btm_scale.train.job import training_job

RESULT = Path(__file__).parent / "results" / "sweep.json"


def main() -> None:
    """Train every point, two at a time, and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--points", nargs="+", required=True, metavar="BATCH_TOKENS:RATE")
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    points = [tuple(point.split(":")) for point in options.points]
    runs = {point: _open(options, *point) for point in points}
    for model in (SEED, DENSE):
        commands = [_command(config, run, model) for config, run in runs.values()]
        run_groups(commands, slots=2, threads=1)
    table = [_row(*runs[point]) for point in points]
    table.sort(key=lambda row: row["mean_dev_perplexity"])
    options.result.parent.mkdir(exist_ok=True)
    options.result.write_text(json.dumps({"environment": describe(), "config": options.config.name, "points": table}, indent=2))
    for row in table:
        print(f"{row['batch_tokens']:>7} {row['lr']:.1e} {row['mean_dev_perplexity']:.3f}")


def _open(options: argparse.Namespace, batch: str, rate: str) -> tuple[RunConfig, RunDir]:
    changes = (*options.set, f"budget.batch_tokens={batch}", f"optimizer.lr={rate}", "evaluate.split=dev",
               "evaluate.tokens_per_domain=32768")  # fmt: skip
    config = RunConfig.load(options.config, changes)
    run = RunDir(options.out.resolve() / f"{batch}-{rate}")
    shared = RunDir(options.out.resolve() / "shared")
    prepare(config, shared)
    run.root.mkdir(parents=True, exist_ok=True)
    for ours, theirs in ((run.data, shared.data), (run.tokenizer, shared.tokenizer)):
        if not ours.exists():
            ours.symlink_to(theirs)
    open_run(config, run)
    return config, run


def _command(config: RunConfig, run: RunDir, model: str) -> GroupCommand:
    arguments = ("train", str(run.config), "--model", model, "--out", str(run.root))
    return GroupCommand(f"{run.root.name} {model}", training_job(config, model).group.ranks, arguments, run.log(model))


def _row(config: RunConfig, run: RunDir) -> dict[str, object]:
    perplexity = {}
    for domain in config.domains:
        scores = Scores.load(run.scores(DENSE, domain, "dev")).log_probs
        perplexity[domain] = math.exp(-float(scores.mean(dtype=np.float64)))
    return {
        "batch_tokens": config.budget.batch_tokens,
        "lr": config.optimizer.lr,
        "mean_dev_perplexity": float(np.mean(list(perplexity.values()))),
        "dev_perplexity": perplexity,
    }


if __name__ == "__main__":
    main()
