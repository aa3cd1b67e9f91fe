"""The tables of README.md and docs/results.md, from the JSON files in benchmarks/results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from doc_counts import (
    count_rows,
    decoding_rows,
    float8_rows,
    loss_rows,
    offload_rows,
    reading_rows,
    utilization_rows,
)
from doc_kernels import grid_rows, host_rows, resource_rows
from environment import environments_of, measured_on

from btm_scale.evaluate.results import Results
from btm_scale.report.equivalence import dense_equivalent

RESULTS = Path(__file__).resolve().parent / "results"
METHODS = (
    "seed",
    "dense",
    "random-split",
    "ensemble",
    "ensemble:tempered",
    "ensemble:static",
    "ensemble:gated",
    "ensemble:top2",
    "ensemble:token",
    "ensemble:equal",
    "average:uniform",
    "average:posterior",
)
AVERAGES = ("average:tempered", "average:greedy")

# Labels of the `worth` table and of the figure.
SHORT_LABELS = {
    "ensemble:tempered": "ensemble, tempered posterior",
    "ensemble": "ensemble, prefix posterior (the paper's)",
    "average:tempered": "tempered average, one model per domain",
    "dense": "dense baseline, same compute",
    "random-split": "control: experts of random text",
    "average:uniform": "uniform average of all experts",
}

# Labels of the `speed` table. The keys are those of the JSON files.
TRAINING = "training on CPU, tokens/s: {case}"
PEERS = {1: "plain PyTorch", 2: "PyTorch DistributedDataParallel"}
ALLOCATORS = {"plain": "", "plain, memory kept": ", malloc keeps freed memory"}
GENERATING = {
    "one_expert_to_transformers": ("one expert", "transformers' `generate`"),
    "mixture_to_part_of_transformers": ("mixture of {experts}", "1/{experts} of `generate`'s rate with one model"),
}
GPU_TRAINING = "training on a GPU, model FLOPs utilization"
ENCODING = "tokenizing text, bytes/s"
TRAINING_GROWTH = "core seconds to train one expert, forest of {most}"
SCORING_GROWTH = "core seconds to score one text, forest of {most}"
OVERHEAD = "orchestration overhead, {most} experts"
MERGING = {
    "page_cache": "merge {models} x {size:.2f} GB, page cache",
    "fsynced": "merge {models} x {size:.2f} GB, fsynced",
    "disk_to_disk": "merge {models} x {size:.2f} GB, cold cache to fsynced output",
    "cpu_time": "merge {models} x {size:.2f} GB, CPU time",
}
MERGE_PEERS = {"times_as_fast_as_mergekit": "mergekit", "times_as_fast_as_a_copy": "plain copy"}
SAVING = {
    "seconds": "save a checkpoint by two ranks, ZeRO {stage}, time",
    "processor_seconds": "save a checkpoint by two ranks, ZeRO {stage}, core seconds of the busier rank",
}
SERVING = {
    "throughput": ("{clients} clients at once, {tokens} tokens each, tokens/s", "{clients} one after another"),
    "lone": ("one client, tokens/s", "`generate`"),
    "routing": ("posterior of a prompt of 255 tokens, time", "reading it once per expert"),
    "proxy": ("request passed to an engine that takes 50 ms, time", "direct request"),
}
KERNELS = "Triton kernels on a GPU"
KERNEL_PEERS = "eager PyTorch, torch.compile, Cut Cross-Entropy, Liger"


def worth() -> str:
    """Mean perplexity over that of the dense baseline: trained and novel domains, all random seeds."""
    rows = [["perplexity relative to the dense baseline", "8 trained domains", "3 novel domains"]]
    ratios = study_ratios()
    for method, label in SHORT_LABELS.items():
        rows.append([label, *("1" if method == "dense" else _spread(values) for values in ratios[method])])
    seeds = len(_read("study")["runs"])
    return f"{_table(rows)}\n\nMean ± standard deviation of {seeds} random seeds; lower is better. {_source('study')}."


def study_ratios() -> dict[str, tuple[list[float], list[float]]]:
    """Return mean perplexity over dense's by method, on trained and novel domains, one number per random seed."""
    runs = [run["results"] for run in _read("study")["runs"]]
    return {
        method: tuple(
            [_mean(run, method, novel) / _mean(run, "dense", novel) for run in runs] for novel in (False, True)
        )
        for method in (*METHODS, *AVERAGES)
        if all(method in run["methods"] for run in runs)
    }


def demo() -> str:
    """Mean perplexity by method, one column per random seed."""
    runs = _read("demo")["runs"]
    rows = [["method", *(f"seed {run['results']['random_seed']}" for run in runs)]]
    for method in METHODS:
        if all(method in run["results"]["methods"] for run in runs):
            rows.append([method, *(f"{_mean(run['results'], method):.2f}" for run in runs)])
    ratios = [f"{_mean(run['results'], 'ensemble') / _mean(run['results'], 'dense'):.3f}" for run in runs]
    rows.append(["**ensemble / dense**", *ratios])
    minutes = min(run["seconds"] for run in runs) / 60
    return (
        f"{_table(rows)}\n\n{_source('demo')}. The fastest of the three took {minutes:.1f} minutes on a shared machine."
    )


def eight_domains() -> str:
    """Perplexity by method and trained domain."""
    result = _read("eight_domains")
    note = f"random seed {result['results']['random_seed']}, {result['seconds'] / 60:.0f} minutes"
    return f"{_by_domain(result['results'], novel=False)}\n\n{_source('eight_domains')}; {note}."


def novel() -> str:
    """Perplexity by method and novel domain."""
    results = _read("eight_domains_novel")["results"]
    note = f"random seed {results['random_seed']}"
    return f"{_by_domain(results, novel=True)}\n\n{_source('eight_domains_novel')}; {note}."


def study() -> str:
    """Mean perplexity over dense's: each random seed, mean and standard deviation."""
    runs = [run["results"] for run in _read("study")["runs"]]
    seeds = [str(run["random_seed"]) for run in runs]
    novel_seeds = [f"novel, seed {seed}" for seed in seeds]
    rows = [["method", *(f"seed {seed}" for seed in seeds), "mean ± sd", *novel_seeds, "mean ± sd"]]
    for method, by_novelty in study_ratios().items():
        if method != "dense":
            row = [method]
            for ratios in by_novelty:
                row += [*(f"{ratio:.3f}" for ratio in ratios), _spread(ratios)]
            rows.append(row)
    return f"{_table(rows)}\n\n{_claims(runs)}{_worth(runs)}\n\n{_source('study')}."


def sweep() -> str:
    """The dense baseline's batch size, learning rate and beta2."""
    rows = [["batch tokens", "learning rate", "beta2", "after half of the schedule", "at the end"]]
    for point in _read("sweep")["points"]:
        end = point["dense_mean_dev_perplexity"]
        setting = [str(point["batch_tokens"]), f"{point['lr']:g}", f"{point['beta2']:g}"]
        rows.append([*setting, f"{point['seed_mean_dev_perplexity']:.1f}", f"{end:.1f}" if end else "-"])
    return _table(rows)


def speed() -> str:
    """Every benchmark, one line per ratio."""
    rows = [["benchmark", "compared with", "ratio"]]
    training = _read("train")
    for name, case in training["cases"].items():
        peer = PEERS[case["case"]["ranks"]]
        for key, ratio in case["ratio_to"].items():
            other = f"{peer}{ALLOCATORS[key]}" if key in ALLOCATORS else f"commit {training['older_commit']}"
            rows.append([TRAINING.format(case=name), other, f"{ratio:.2f}"])
    rows += _generating()
    rows.append([GPU_TRAINING, "plain PyTorch, torch.compile", _on_gpu()])
    rows.append([ENCODING, "sentencepiece with threads", f"{_read('encode')['rate']['median_ratio']:.2f}"])
    many = _read("many_experts")
    few, most = (pick(run["experts"] for run in many["runs"]) for pick in (min, max))
    smaller = f"forest of {few}"
    rows.append([TRAINING_GROWTH.format(most=most), smaller, f"{many['growth_of_training_time_an_expert']:.2f}"])
    rows.append([SCORING_GROWTH.format(most=most), smaller, f"{many['growth_of_scoring_time_a_text']:.2f}"])
    rows.append([OVERHEAD.format(most=most), "wall time", f"{most_overhead(many):.3f}"])
    merge = _read("merge")["speed"]
    for key, peer in MERGE_PEERS.items():
        for case, ratio in merge[key].items():
            label = MERGING[case].format(models=merge["models"], size=merge["bytes_per_model"] / 1e9)
            rows.append([label, peer, f"{ratio:.2f}"])
    for stage, figures in _read("checkpoint")["zero"].items():
        for name, label in SAVING.items():
            rows.append([label.format(stage=stage), "one rank", f"{figures[f'ratio_of_{name}']:.2f}"])
    rows.append([KERNELS, KERNEL_PEERS, "not measured"])
    return _table(rows)


def serving() -> str:
    """The ratios of the server, which were measured on the demo's forest."""
    result = _read("serve")
    clients, tokens = result["clients"], result["tokens"]
    rows = [["measured", "compared with", "ratio"]]
    for name, (label, peer) in SERVING.items():
        ratio = f"{result[name]['ratio']:.2f}" if name in result else "not measured"
        rows.append([label.format(clients=clients, tokens=tokens), peer.format(clients=clients), ratio])
    note = ""
    if "proxy" in result:
        added = result["proxy"]["routing_adds_milliseconds"]
        note = f" Behind engines, routing adds {added:.1f} ms to the request that scores and the one that generates."
    return f"{_table(rows)}\n\n{_source('serve')}.{note}"


def gpu_counts() -> str:
    """Kernels and bytes of training on a GPU, and the utilization that they give."""
    counts = _read("gpu_counts")
    losses = loss_rows(counts, _read("gpu_counts_older"))
    parts = (count_rows, utilization_rows, float8_rows, offload_rows, decoding_rows, reading_rows)
    return "\n\n".join([_table(losses), *(_table(rows_of(counts)) for rows_of in parts)])


def kernel_resources() -> str:
    """Instructions, registers and shared memory of the kernels, and the grids of the scoring kernel."""
    result = _read("kernel_resources")
    return f"{_table(resource_rows(result))}\n\n{_table(grid_rows(result))}"


def mixing_host() -> str:
    """Launches and host time of the mixing kernels."""
    return _table(host_rows(_read("mixing_host")))


def most_overhead(many: dict[str, Any]) -> float:
    """The fraction of wall time in which the largest forest trains and scores nothing."""
    return max(many["runs"], key=lambda run: run["experts"])["overhead"]


TABLES: dict[str, Callable[[], str]] = {
    "worth": worth,
    "demo": demo,
    "eight_domains": eight_domains,
    "novel": novel,
    "study": study,
    "sweep": sweep,
    "speed": speed,
    "serving": serving,
    "gpu_counts": gpu_counts,
    "kernel_resources": kernel_resources,
    "mixing_host": mixing_host,
}


def _by_domain(results: dict[str, Any], novel: bool) -> str:
    """One row per method, one column per trained or novel domain, the mean and its ratio to dense."""
    domains = [name for name, domain in results["domains"].items() if domain["novel"] == novel]
    rows = [["method", *domains, "mean", "/ dense"]]
    for method in METHODS:
        if method in results["methods"]:
            values = results["methods"][method]["perplexity"]
            mean = _mean(results, method, novel)
            ratio = mean / _mean(results, "dense", novel)
            rows.append([method, *(f"{values[domain]:.1f}" for domain in domains), f"{mean:.2f}", f"{ratio:.3f}"])
    return _table(rows)


def _claims(runs: Sequence[dict[str, Any]]) -> str:
    """On how many domains, counted in each seed, averages beat the uniform one, and what top-k costs."""

    def better(average: str, novel: bool) -> str:
        pairs = [
            (
                run["methods"][f"average:{average}"]["perplexity"],
                run["methods"]["average:uniform"]["perplexity"],
                domain,
            )
            for run in runs
            for domain, about in run["domains"].items()
            if about["novel"] == novel
        ]
        return f"{sum(one[domain] < uniform[domain] for one, uniform, domain in pairs)} of {len(pairs)}"

    worst = max(
        methods["ensemble:top2"]["perplexity"][domain] / methods["ensemble"]["perplexity"][domain]
        for run in runs
        for methods in [run["methods"]]
        for domain in run["domains"]
    )
    return (
        f"Counted over all seeds, the posterior average beats the uniform one on {better('posterior', False)} trained "
        f"and {better('posterior', True)} novel domains, and the tempered average on {better('tempered', False)} and "
        f"{better('tempered', True)}. The two experts with the largest prior are at most "
        f"{100 * (worst - 1):.1f}% worse than all eight on every domain."
    )


def _worth(runs: Sequence[dict[str, Any]]) -> str:
    """How much dense compute the ensemble equals, in each seed with dense baselines of more compute."""
    signs = {"=": "matches", "<": "is worth less than", ">": "beats"}
    text = ""
    for run in runs:
        results = Results.model_validate({key: value for key, value in run.items() if key != "schema"})
        equivalents = [dense_equivalent(results, method) for method in ("ensemble", "ensemble:tempered")]
        if all(equivalents):
            plain, tempered = (f"{signs[sign]} {times:.2f} times" for times, sign in filter(None, equivalents))
            longer = [name for name in run["methods"] if name.startswith("dense-")]
            factors = " and ".join(name.removeprefix("dense-").removesuffix("x") for name in longer)
            shares = " and ".join(f"{_mean(run, name) / _mean(run, 'dense'):.3f}" for name in longer)
            text += (
                f" Seed {run['random_seed']} also has dense baselines of {factors} times the compute; they reach "
                f"{shares} of the dense baseline's perplexity. Interpolated between them, the ensemble {plain} its "
                f"compute, and with the tempered posterior it {tempered}. The paper reports 2.5 times for 64 domains."
            )
    return text


def _generating() -> list[list[str]]:
    """Return the rows of generation on CPU, by preset and batch."""
    if not (RESULTS / "generate.json").is_file():
        return [["generating on CPU, tokens/s", "transformers' `generate`", "not measured"]]
    result = _read("generate")
    rows = []
    for key, (what, peer) in GENERATING.items():
        for run in result["runs"]:
            case = f"{run['preset']}, batch {run['batch']}"
            label = f"generating on CPU, tokens/s: {what}, {case}"
            names = [text.format(experts=result["settings"]["experts"]) for text in (label, peer)]
            rows.append([*names, f"{run[key]:.2f}"])
    return rows


def _on_gpu() -> str:
    path = RESULTS / "train_gpu.json"
    if not path.is_file():
        return "not measured"
    peers = json.loads(path.read_text())["peers"]
    return ", ".join(f"{peer} {figures['model_flops_utilisation']:.2f}" for peer, figures in peers.items())


def _read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _mean(results: dict[str, Any], method: str, novel: bool = False) -> float:
    perplexity = results["methods"][method]["perplexity"]
    return float(np.mean([perplexity[name] for name, about in results["domains"].items() if about["novel"] == novel]))


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def _source(name: str) -> str:
    return measured_on(environments_of(_read(name)))


def _table(rows: list[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
