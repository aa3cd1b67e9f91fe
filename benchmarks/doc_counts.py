"""The tables of what training does on a GPU, by counts."""

from __future__ import annotations

from typing import Any

Rows = list[list[str]]
_OURS, _PEER = "ours", "compiled"
LABELS = {_OURS: "btm-scale", "megatron": "Megatron-core's fused functions", _PEER: "plain model, torch.compile"}


def count_rows(counts: dict[str, Any]) -> Rows:
    """Return kernels and gigabytes: of the loss of a micro-batch, of a layer besides its products, and of sums."""
    rows = [["counted on `meta` tensors", *LABELS.values()]]
    for part, label in (("loss", "loss of a micro-batch"), ("layer", "a layer besides its products")):
        for name in counts[_OURS][part]:
            rows.append([f"{label}, {name}", *(_count(counts[key].get(part, {}).get(name)) for key in LABELS)])
    for name, version in counts[_OURS]["training"].items():
        rows.append(
            [f"sums of gradients, {name}", _gigabytes(version), "-", _gigabytes(counts[_PEER]["training"][name])]
        )
    return rows


def utilization_rows(counts: dict[str, Any]) -> Rows:
    """Return the utilization that the counts give, by GPU."""
    keys = (_OURS, _PEER)
    rows = [["utilization by the formula", *(LABELS[key] for key in keys)]]
    for name, version in counts[_OURS]["training"].items():
        for gpu in (key for key in version if key != "bytes"):
            values = [f"{counts[key]['training'][name][gpu]['utilization']:.2f}" for key in keys]
            rows.append([f"{name}, {gpu}", *values])
    return rows


def _gigabytes(training: dict[str, Any]) -> str:
    return f"{training['bytes']['sums'] / 1e9:.1f} GB"


def _count(count: dict[str, Any] | None) -> str:
    return "-" if count is None else f"{count['kernels']:,} kernels, {count['bytes'] / 1e9:,.2f} GB"
