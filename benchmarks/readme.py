"""Write the README's figures from benchmarks/results/*.json, between its `<!-- figures: NAME -->` marks."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from btm_scale.evaluate.results import Results
from btm_scale.report.equivalence import dense_equivalent

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
METHODS = (
    "seed",
    "dense",
    "dense-2.5x",
    "random-split",
    "ensemble",
    "ensemble:tempered",
    "ensemble:top2",
    "ensemble:token",
    "ensemble:equal",
    "average:uniform",
    "average:posterior",
)


def main() -> None:
    """Fill every mark in the README."""
    path = ROOT / "README.md"
    text = path.read_text()
    for name, figures in FIGURES.items():
        mark = f"<!-- figures: {name} -->\n"
        pattern = re.escape(mark) + ".*?<!-- end -->"
        if not re.search(pattern, text, re.DOTALL):
            raise SystemExit(f"README.md has no mark '{mark.strip()}'")
        try:
            body = figures()
        except FileNotFoundError as error:
            body = f"Not measured: there is no {Path(error.filename).relative_to(ROOT)}."
        body = f"{mark}{body}\n<!-- end -->"
        text = re.sub(pattern, lambda _, body=body: body, text, flags=re.DOTALL)
    path.write_text(text)


def demo() -> str:
    """Mean perplexity by method, a column a random seed."""
    runs = _read("demo")["runs"]
    rows = [["method", *(f"seed {run['results']['random_seed']}" for run in runs)]]
    for method in METHODS:
        if all(method in run["results"]["methods"] for run in runs):
            rows.append([method, *(f"{_mean(run['results'], method):.2f}" for run in runs)])
    ratios = [f"{_mean(run['results'], 'ensemble') / _mean(run['results'], 'dense'):.3f}" for run in runs]
    rows.append(["**ensemble / dense**", *ratios])
    minutes = min(run["seconds"] for run in runs) / 60
    note = f"{_source('demo')}. The quickest of the three took {minutes:.1f} minutes; other work ran beside them."
    return f"{_table(rows)}\n\n{note}"


def eight_domains() -> str:
    """Perplexity by method and domain."""
    result = _read("eight_domains")
    results = result["results"]
    rows = [["method", *results["domains"], "mean", "/ dense"]]
    dense = _mean(results, "dense")
    for method in METHODS:
        if method in results["methods"]:
            values = results["methods"][method]["perplexity"]
            mean = _mean(results, method)
            rows.append(
                [
                    method,
                    *(f"{values[domain]:.1f}" for domain in results["domains"]),
                    f"{mean:.2f}",
                    f"{mean / dense:.3f}",
                ]
            )
    note = f"random seed {results['random_seed']}, {result['seconds'] / 60:.0f} minutes"
    return f"{_table(rows)}\n\n{_source('eight_domains')}; {note}."


def novel() -> str:
    """Perplexity on text that nobody was trained on."""
    results = _read("eight_domains_novel")["results"]
    domains = [name for name, domain in results["domains"].items() if domain["novel"]]

    def mean(method: str) -> float:
        return float(np.mean([results["methods"][method]["perplexity"][domain] for domain in domains]))

    rows = [["method", *domains, "mean", "/ dense"]]
    for method in METHODS:
        if method in results["methods"]:
            values = results["methods"][method]["perplexity"]
            rows.append(
                [
                    method,
                    *(f"{values[domain]:.1f}" for domain in domains),
                    f"{mean(method):.1f}",
                    f"{mean(method) / mean('dense'):.3f}",
                ]
            )
    return f"{_table(rows)}\n\n{_source('eight_domains_novel')}; random seed {results['random_seed']}."


def study() -> str:
    """Means over the domains as shares of dense's: three random seeds, their mean and spread."""
    runs = [run["results"] for run in _read("study")["runs"]]
    seeds = [str(run["random_seed"]) for run in runs]
    rows = [
        [
            "method",
            *(f"seed {seed}" for seed in seeds),
            "mean ± sd",
            *(f"novel, seed {seed}" for seed in seeds),
            "mean ± sd",
        ]
    ]
    for method in (*METHODS, "average:tempered", "average:greedy"):
        if method != "dense" and all(method in run["methods"] for run in runs):
            row = [method]
            for novel_ones in (False, True):
                ratios = [_mean(run, method, novel_ones) / _mean(run, "dense", novel_ones) for run in runs]
                row += [*(f"{ratio:.3f}" for ratio in ratios), _spread(ratios)]
            rows.append(row)
    return f"{_table(rows)}\n\n{_claims(runs)}{_worth(runs)}\n\n{_source('study')}."


def _claims(runs: Sequence[dict[str, Any]]) -> str:
    """How many domains of how many, over all seeds, hold what is said of averages and of top-k."""

    def better(average: str, novel_ones: bool) -> str:
        pairs = [
            (
                run["methods"][f"average:{average}"]["perplexity"],
                run["methods"]["average:uniform"]["perplexity"],
                domain,
            )
            for run in runs
            for domain, about in run["domains"].items()
            if about["novel"] == novel_ones
        ]
        return f"{sum(one[domain] < uniform[domain] for one, uniform, domain in pairs)} of {len(pairs)}"

    worst = max(
        methods["ensemble:top2"]["perplexity"][domain] / methods["ensemble"]["perplexity"][domain]
        for run in runs
        for methods in [run["methods"]]
        for domain in run["domains"]
    )
    return (
        f"The posterior average beats the uniform one on {better('posterior', False)} trained domains, counted in each "
        f"seed, and on {better('posterior', True)} novel ones; the tempered average on {better('tempered', False)} and "
        f"{better('tempered', True)}. The ensemble's top two experts are nowhere more than "
        f"{100 * (worst - 1):.1f}% behind all eight."
    )


def _worth(runs: Sequence[dict[str, Any]]) -> str:
    """How much dense compute the ensemble equals, in each seed that trained dense models of more compute."""
    signs = {"=": "as good as", "<": "worth less than", ">": "better than"}
    sentence = ""
    for run in runs:
        results = Results.model_validate({key: value for key, value in run.items() if key != "schema"})
        found = [dense_equivalent(results, method) for method in ("ensemble", "ensemble:tempered")]
        if all(found):
            plain, tempered = (f"{signs[sign]} {times:.2f} times" for times, sign in filter(None, found))
            longer = [name for name in run["methods"] if name.startswith("dense-")]
            factors = " and ".join(name.removeprefix("dense-").removesuffix("x") for name in longer)
            shares = " and ".join(f"{_mean(run, name) / _mean(run, 'dense'):.3f}" for name in longer)
            sentence += (
                f" In seed {run['random_seed']} dense models of {factors} times the compute were trained too, with "
                f"{shares} of the dense baseline's perplexity: the ensemble is {plain} its compute, and with the "
                f"tempered posterior {tempered}; the paper's forest of 64 domains was worth 2.5 times its compute."
            )
    return sentence


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def sweep() -> str:
    """The dense baseline's batch size and rate."""
    rows = [["batch tokens", "learning rate", "beta2", "after half of the schedule", "at the end"]]
    for point in _read("sweep")["points"]:
        end = point["dense_mean_dev_perplexity"]
        setting = [str(point["batch_tokens"]), f"{point['lr']:g}", f"{point['beta2']:g}"]
        rows.append([*setting, f"{point['seed_mean_dev_perplexity']:.1f}", f"{end:.1f}" if end else "-"])
    return _table(rows)


def speed() -> str:
    """Every benchmark in one line each."""
    rows = [["what", "beside", "ratio"]]
    for name, case in _read("train")["cases"].items():
        peer = "plain PyTorch" if case["case"]["ranks"] == 1 else "PyTorch's DistributedDataParallel"
        for kept, ratio in zip(("", ", keeping freed memory too"), case["ratio_to"].values(), strict=True):
            rows.append([f"training on CPU, tokens/s: {name}", f"{peer}{kept}", f"{ratio:.2f}"])
    rows.append(["training on a GPU: FLOPs utilisation", "plain PyTorch, torch.compile", _on_gpu()])
    encode = _read("encode")
    rows.append(["encoding text, bytes/s", "sentencepiece's own threads", f"{encode['rate']['median_ratio']:.2f}"])
    many = _read("many_experts")
    few, most = (pick(many["runs"], key=lambda run: run["experts"]) for pick in (min, max))
    beside = f"a forest of {few['experts']}"
    rows.append(
        [
            f"time to train an expert of a forest of {most['experts']}",
            beside,
            f"{many['growth_of_training_time_an_expert']:.2f}",
        ]
    )
    rows.append(
        [
            f"time to score a text under an expert of a forest of {most['experts']}",
            beside,
            f"{many['growth_of_scoring_time_a_text']:.2f}",
        ]
    )
    rows.append(
        [f"time with nothing trained or scored, {most['experts']} experts", "the run's", f"{most['overhead']:.3f}"]
    )
    merge = RESULTS / "merge.json"
    if merge.is_file():
        figures = json.loads(merge.read_text())
        for case in figures.get("summary", []):
            rows.append([case["what"], case["beside"], f"{case['ratio']:.2f}"])
    rows.append(["Triton kernels on a GPU", "eager PyTorch, torch.compile, Cut Cross-Entropy, Liger", "not measured"])
    return _table(rows)


def _on_gpu() -> str:
    path = RESULTS / "train_gpu.json"
    if not path.is_file():
        return "not measured"
    peers = json.loads(path.read_text())["peers"]
    return ", ".join(f"{figures['model_flops_utilisation']:.2f}" for figures in peers.values())


FIGURES: dict[str, Callable[[], str]] = {
    "demo": demo,
    "eight_domains": eight_domains,
    "novel": novel,
    "study": study,
    "sweep": sweep,
    "speed": speed,
}


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _mean(results: dict[str, Any], method: str, novel_ones: bool = False) -> float:
    perplexity = results["methods"][method]["perplexity"]
    return float(
        np.mean([perplexity[name] for name, about in results["domains"].items() if about["novel"] == novel_ones])
    )


def _source(name: str) -> str:
    environment = _read(name)["environment"]
    hardware = environment["hardware"]
    return f"{hardware['cpu']}, {hardware['cores']} cores, {environment['date'][:10]}"


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
