"""The table of separate documents in docs/results.md, from benchmarks/results/packed.json."""

from __future__ import annotations

from collections.abc import Callable

from doc_tables import _read, _source, _table

_WORK = {"c": "all work", "attention alone": "attention alone"}


def packed() -> str:
    """Step times of separate documents, and the imbalance of data ranks."""
    result = _read("packed")
    length = result["case"]["length"]
    rows = [["measured", "compared with", "ratio"]]
    if "steps" not in result:
        rows.append([f"step, documents in sequences of {length}", "causal attention", "not measured"])
    for mean, figures in result.get("steps", {}).items():
        rows.append([f"step, {mean} tokens in sequences of {length}", "causal attention", f"{figures['ratio']:.2f}"])
    for kind, found in result["imbalance"].items():
        for order, figures in found.items():
            name = "balanced" if order == "balanced" else "in the order of the text"
            ratio = f"{figures['mean']:.3f}, at most {figures['max']:.3f}"
            rows.append([f"most loaded data rank, {name}: {_WORK[kind]}", "mean of 8 data ranks", ratio])
    c = f"; c is {result['other_work_tokens']:,.0f} tokens" if "other_work_tokens" in result else ""
    return f"{_table(rows)}\n\n{_source('packed')}{c}."


TABLES: dict[str, Callable[[], str]] = {"packed": packed}
