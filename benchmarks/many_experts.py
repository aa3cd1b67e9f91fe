"""Cost of many experts beyond their training: forests of 8 and 64 of the same small expert on this machine.

    python benchmarks/many_experts.py [--experts 8 64 8] [--steps 10]

Each run goes from text to page, with one group per core at a time. Three figures: core seconds per expert without
scoring (start, train, export, load, exit) and core seconds per scored text, neither of which should grow with the
number of experts (the number of texts does: every expert is scored on every domain); and the overhead, the fraction
of wall time in which no model trains or scores: averages, priors, ensembles, and the page. Tokenizing is excluded,
because it depends on the text alone. Writes results/many_experts.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environment import describe

from btm_scale.config.run import RunConfig
from btm_scale.config.yaml import dump_text
from btm_scale.data.demo_text import write_installed_text
from btm_scale.data.prepare import prepare
from btm_scale.forest.scores import all_texts
from btm_scale.launch.local import LocalPool
from btm_scale.launch.supervise import GroupCommand, OnPoll, run_groups_in
from btm_scale.run.pipeline import run_all
from btm_scale.run.state import open_run
from btm_scale.run_dir import RunDir

RESULT = Path(__file__).parent / "results" / "many_experts.json"
LENGTH, SEQUENCES = 128, 4  # of one expert's batch


def main() -> None:
    """Measure every number of experts and write the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64, 8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--preset", default="llama-1m")
    parser.add_argument("--folder", type=Path, help="for the runs; default: a temporary folder")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        # The small forest before and after the large one: a machine's speed drifts.
        rows = [measure(Path(folder) / str(place), number, options) for place, number in enumerate(options.experts)]

    def growth(what: str) -> float:
        few = [row[what] for row in rows if row["experts"] == min(options.experts)]
        most = [row[what] for row in rows if row["experts"] == max(options.experts)]
        return float(statistics.mean(most) / statistics.mean(few))

    result = {
        "environment": describe(),
        "settings": {"steps": options.steps, "preset": options.preset, "tokens_a_step": LENGTH * SEQUENCES},
        "runs": rows,
        "growth_of_training_time_an_expert": growth("core_seconds_training_an_expert"),
        "growth_of_scoring_time_a_text": growth("core_seconds_scoring_a_text"),
    }
    options.result.parent.mkdir(exist_ok=True)
    options.result.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


@dataclass
class Clock:
    """Runs groups on this machine and measures the time in which at least one of them runs."""

    slots: int
    stages: list[tuple[list[str], float]] = field(default_factory=list)

    def __call__(self, commands: Sequence[GroupCommand], on_poll: OnPoll) -> None:
        """Run every group."""
        begin = time.perf_counter()
        run_groups_in(LocalPool(self.slots, 1), commands, on_poll)
        self.stages.append(([command.name for command in commands], time.perf_counter() - begin))

    @property
    def seconds(self) -> float:
        """In which a group ran."""
        return sum(seconds for _, seconds in self.stages)


def measure(folder: Path, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """One run with this number of experts."""
    cores = len(os.sched_getaffinity(0))
    folder.mkdir()
    text = folder / f"text-{number}"
    path = folder / f"{number}.yaml"
    path.write_text(dump_text(_values(write_domains(text, number), text, number, options)))
    config = RunConfig.load(path)
    run = RunDir(folder / f"run-{number}")
    open_run(config, run)
    prepare(config, run)
    clock = Clock(cores)
    begin = time.perf_counter()
    results = run_all(config, run, on_progress=lambda rows: None, launcher=clock)
    total = time.perf_counter() - begin
    merging = sum(float(seconds) for seconds in re.findall(r"merged in ([\d.]+) s", run.log("score").read_text()))
    own = total - clock.seconds + merging
    stage = next((names, seconds) for names, seconds in clock.stages if len(names) == number)
    a_text = sum(_seconds_a_text(run, model) for model in stage[0]) / number
    texts = len(all_texts(config))
    return {
        "experts": number,
        "methods": len(results.methods),
        "seconds": total,
        "core_seconds_training_an_expert": stage[1] * cores / number - a_text * texts,
        "core_seconds_scoring_a_text": a_text,
        "texts": texts,
        "seconds_making_and_scoring_averages": sum(seconds for names, seconds in clock.stages if names == ["score"]),
        "seconds_merging": merging,
        "seconds_without_a_group": total - clock.seconds,
        "overhead": own / total,
    }


def _seconds_a_text(run: RunDir, model: str) -> float:
    """Seconds per text, from the first of a model's scores to the last."""
    times = [path.stat().st_mtime for path in run.model_scores(model).glob("*.safetensors")]
    return (max(times) - min(times)) / (len(times) - 1)


def write_domains(folder: Path, number: int) -> dict[str, dict[str, Any]]:
    """Text of n domains, each every n-th document of this installation's text."""
    write_installed_text(folder / "all", bytes_per_domain=4_000_000, longest=1_000)
    lines = [line for path in sorted((folder / "all").glob("*.jsonl")) for line in path.read_text().splitlines()]
    domains = {}
    for part in range(number):
        name = f"part-{part:02d}"
        (folder / f"{name}.jsonl").write_text("\n".join(lines[part::number]) + "\n")
        domains[name] = {"text": [f"{name}.jsonl"]}
    return domains


def _values(domains: dict[str, Any], text: Path, number: int, options: argparse.Namespace) -> dict[str, Any]:
    batch = LENGTH * SEQUENCES * number
    return {
        "name": f"experts-{number}",
        "model": {"preset": options.preset},
        "tokenizer": {"vocab_size": 2048},
        "text_root": str(text),
        "domains": domains,
        # The seed takes as many steps as an expert, of as many tokens: it is not what is measured.
        "budget": {
            "tokens": 2 * options.steps * batch,
            "seed_share": 0.5,
            "sequence_length": LENGTH,
            "batch_tokens": batch,
        },
        "data": {"dev": 0.1, "test": 0.1},
        "layout": {"micro_batch": SEQUENCES},
        "baselines": {"dense": False},
        "evaluate": {"tokens_per_domain": 1024, "dev_blocks": 4},
    }


if __name__ == "__main__":
    main()
