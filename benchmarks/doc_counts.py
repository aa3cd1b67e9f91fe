"""The tables of the kernels and bytes that are counted for training and decoding on a GPU."""

from __future__ import annotations

from typing import Any

Rows = list[list[str]]
_OURS, _PEER = "ours", "compiled"
LOSSES = {
    _OURS: "btm-scale",
    "liger": "Liger-Kernel",
    "pytorch": "PyTorch's `linear_cross_entropy`",
    _PEER: "`cross_entropy`, torch.compile, without products",
}
LABELS = {_OURS: "btm-scale", "megatron": "Megatron-core's fused functions", _PEER: "plain model, torch.compile"}


def count_rows(counts: dict[str, Any]) -> Rows:
    """Return kernels and GB of a layer without its matrix products, and of gradient accumulation."""
    rows = [["counted on `meta` tensors", *LABELS.values()]]
    for name in counts[_OURS]["layer"]:
        cells = (_count(counts[key].get("layer", {}).get(name)) for key in LABELS)
        rows.append([f"a layer without its matrix products, {name}", *cells])
    for name, version in counts[_OURS]["training"].items():
        rows.append(
            [f"gradient accumulation, {name}", _gigabytes(version), "-", _gigabytes(counts[_PEER]["training"][name])]
        )
    return rows


def loss_rows(counts: dict[str, Any], older: dict[str, Any]) -> Rows:
    """Return kernels and GB of the loss, beside its peers' and an older version's."""
    keys = (_OURS, "liger", "pytorch", _PEER)
    rows = [["loss of a micro-batch", *(LOSSES[key] for key in keys), f"btm-scale, commit {older['commit']}"]]
    for name, count in older["loss"].items():
        rows.append([name, *(_count(counts[key]["loss"].get(name)) for key in keys), _count(count)])
    return rows


def utilization_rows(counts: dict[str, Any]) -> Rows:
    """Return the model FLOPs utilization that the formula predicts from the counts, by GPU."""
    keys = (_OURS, _PEER)
    rows = [["MFU by the formula", *(LABELS[key] for key in keys)]]
    for name, version in counts[_OURS]["training"].items():
        for gpu in (key for key in version if key != "bytes"):
            values = [f"{counts[key]['training'][name][gpu]['utilization']:.2f}" for key in keys]
            rows.append([f"{name}, {gpu}", *values])
    return rows


def float8_rows(counts: dict[str, Any]) -> Rows:
    """Return kernels and GB of a layer without and with float8, and the milliseconds that float8 saves and adds."""
    rows = [["a layer without its products", "bfloat16", "float8", "saved by products", "added, H100", "added, H200"]]
    for name, count in counts[_OURS]["float8"].items():
        seconds = count["seconds"]
        times = (f"{1e3 * value:.1f} ms" for value in (seconds["saved"], *seconds["added"].values()))
        rows.append([name, _count(count["without"]), _count(count["layer"]), *times])
    return rows


def offload_rows(counts: dict[str, Any]) -> Rows:
    """Return the time to copy a layer's input beside the layer's, and the activations with and without offloading."""
    rows = [
        ["llama-3.1-8b, one sequence", "copy, layer forward", "copy / layer", "activations", "offloaded", "on the host"]
    ]
    for name, count in counts[_OURS]["offload"].items():
        copy, layer = count["copy_seconds"], count["layer_seconds"]
        held = (f"{count[key] / 1e9:.1f} GB" for key in ("kept_bytes", "offloaded_bytes", "host_bytes"))
        rows.append([name, f"{1e3 * copy:.2f}, {1e3 * layer:.2f} ms", f"{copy / layer:.2f}", *held])
    return rows


def decoding_rows(counts: dict[str, Any]) -> Rows:
    """Return kernels and GB of one step of decoding from a mixture."""
    rows = [["the next token of a mixture", LABELS[_OURS], "transformers' models one by one, without sampling"]]
    for name, count in counts[_OURS]["decoding"].items():
        rows.append([name, _count(count), _count(counts["transformers"]["decoding"][name])])
    return rows


def reading_rows(counts: dict[str, Any]) -> Rows:
    """Return kernels and GB of reading and scoring a prompt under stacked experts."""
    rows = [["a prompt that stacked experts read and score", "scored from hidden states", "scored from logits"]]
    for name, count in counts[_OURS]["reading"].items():
        rows.append([name, _count(count["states"]), _count(count["logits"])])
    return rows


def _gigabytes(training: dict[str, Any]) -> str:
    return f"{training['bytes']['sums'] / 1e9:.1f} GB"


def _count(count: dict[str, Any] | None) -> str:
    return "-" if count is None else f"{count['kernels']:,} kernels, {count['bytes'] / 1e9:,.2f} GB"
