"""The table of families of ensemble weights in docs/results.md, from benchmarks/results/ensembles.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from doc_tables import _read, _source, _spread, _table

# Labels of the families of ensemble_families.py, with the method that has these weights.
LABELS = {
    "prefix": "prefix posterior, cached prior: `ensemble`",
    "prefix, static prior": "prefix posterior, static prior",
    "static prior alone": "static prior at every token",
    "tempered": "tempered, cached prior: `ensemble:tempered`",
    "tempered, static prior": "tempered, static prior: `ensemble:static`",
    "soft-bayes": "Soft-Bayes, static prior",
    "exponentiated gradient": "exponentiated gradient, static prior",
    "mixture of temperings": "Bayesian mixture of temperings, nothing fitted but the prior",
    "mixture of temperings, dev prior": "mixture of temperings, weighted by dev text",
    "gate": "gate on evidence of five lengths, static prior: `ensemble:gated`",
    "stack": "fixed mixture of the tempered, the Soft-Bayes, the gated and the prefix mixture",
}


def ensembles() -> str:
    """Mean perplexity over dense's, by family: each random seed, trained and novel domains."""
    try:
        measured = _read("ensembles")["runs"]
    except FileNotFoundError:
        return "Not measured yet: `python benchmarks/ensembles.py` takes the measurements."
    parts = []
    for name, runs in measured.items():
        parts.append(f"{_heading(name, runs)}\n\n{_table(_rows(runs))}")
    return "\n\n".join([*parts, f"{_source('ensembles')}."])


def mean_ratio(measured: Mapping[str, Any], family: str, novel: bool) -> float | None:
    """Return a family's mean perplexity over dense's, of trained or of novel domains; None if there are none."""
    dense, perplexity = measured["dense"], measured["families"][family]["perplexity"]
    domains = [domain for domain in dense if (domain in measured["novel"]) == novel]
    if not domains:
        return None
    return float(np.mean([perplexity[domain] for domain in domains]) / np.mean([dense[domain] for domain in domains]))


def _rows(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    seeds = [f"seed {run['random_seed']}" for run in runs]
    rows = [["weights"]]
    columns = []
    for novel in (False, True):
        if all(run["novel"] for run in runs) or not novel:
            columns.append(novel)
            heads = [f"novel, {seed}" for seed in seeds] if novel else seeds
            rows[0] += [*heads, *(["mean ± sd"] if len(runs) > 1 else [])]
    for family, label in LABELS.items():
        row = [label]
        for novel in columns:
            values = [value for run in runs if (value := mean_ratio(run, family, novel)) is not None]
            row += [f"{value:.4f}" for value in values]
            row += [_spread(values)] if len(runs) > 1 else []
        rows.append(row)
    return rows


def _heading(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    trained = [domain for domain in runs[0]["dense"] if domain not in runs[0]["novel"]]
    novel = f"; novel: {', '.join(runs[0]['novel'])}" if runs[0]["novel"] else ""
    tokens = runs[0]["dev_tokens"]
    most = max(tokens.values())
    fewer = [f"{domain} {count:,}" for domain, count in tokens.items() if count < most]
    but = f" (but {', '.join(fewer)})" if fewer else ""
    return f"`{name}`, trained: {', '.join(trained)}{novel}; {most:,} dev tokens per domain{but}:"


TABLES: dict[str, Callable[[], str]] = {"ensembles": ensembles}
