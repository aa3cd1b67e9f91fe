"""Ensembles of finished runs by every family of weights, each tuned on dev text alone.

    python benchmarks/ensembles.py runs/eight-1 runs/eight-2 runs/eight-3 --name eight_domains

Needs only the runs' scores. Writes benchmarks/results/ensembles.json, beside what it has of other names and seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from doc_ensembles import mean_ratio
from ensemble_families import FAMILIES, Text
from environment import describe

from btm_scale.config.run import RunConfig
from btm_scale.forest.forest import experts
from btm_scale.forest.scores import Scores, Stack
from btm_scale.run_dir import DENSE, RunDir

RESULT = Path(__file__).parent / "results" / "ensembles.json"


def main() -> None:
    """Measure every run, print the ratios and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--name", required=True, help="of these runs in the result, such as demo")
    parser.add_argument("--result", type=Path, default=RESULT)
    options = parser.parse_args()
    measured = [measure(RunDir(path)) for path in options.runs]
    for one in measured:
        print(f"random seed {one['random_seed']}: trained and novel, / dense")
        for family, figures in one["families"].items():
            means = [mean_ratio(one, family, novel) for novel in (False, True)]
            shown = "  ".join("-     " if mean is None else f"{mean:.4f}" for mean in means)
            print(f"  {family:34} {shown}  {figures['seconds']:.1f} s")
    document: dict[str, Any] = {"runs": {}}
    if options.result.is_file():
        document = json.loads(options.result.read_text())
    document["environment"] = describe()
    by_seed = {one["random_seed"]: one for one in (*document["runs"].get(options.name, []), *measured)}
    document["runs"][options.name] = [by_seed[seed] for seed in sorted(by_seed)]
    options.result.write_text(json.dumps(document, indent=1) + "\n")


def measure(run: RunDir) -> dict[str, Any]:
    """Return the perplexity of each family, of dense and of the best expert on each domain of a run."""
    config, names = RunConfig.load(run.config), list(experts(run))
    split = config.evaluate.split
    if split == "dev":
        raise SystemExit(f"{run.root} was evaluated on dev text, on which the weights are tuned. Set evaluate.split.")
    families: dict[str, dict[str, Any]] = {name: {"seconds": 0.0, "perplexity": {}} for name in FAMILIES}
    dense, dev_tokens = {}, {}
    for domain in config.all_domains:
        dev, test = (_text(Stack.load(run, names, domain, one)) for one in ("dev", split))
        dev_tokens[domain] = int(dev.log_probs.shape[1])
        reference = Scores.load(run.scores(DENSE, domain, split)).log_probs
        dense[domain] = _perplexity(reference, test)
        for name, family in FAMILIES.items():
            begin = time.perf_counter()
            families[name]["perplexity"][domain] = _perplexity(family(dev, test), test)
            families[name]["seconds"] += time.perf_counter() - begin
    return {
        "random_seed": config.random_seed,
        "novel": list(config.novel_domains),
        "dev_tokens": dev_tokens,
        "dense": dense,
        "families": families,
    }


def _text(stack: Stack) -> Text:
    return Text(stack.log_probs.astype(np.float64), stack.block_starts, stack.counted)


def _perplexity(log_probs: np.ndarray, text: Text) -> float:
    counted = log_probs if text.counted is None else log_probs[text.counted]
    return float(np.exp(-np.mean(counted, dtype=np.float64)))


if __name__ == "__main__":
    main()
