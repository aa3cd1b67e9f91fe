"""What offloading the inputs of layers moves and frees: an 8B model's bytes per layer beside the layer's time."""

from __future__ import annotations

from typing import Any

from btm_scale.config.layout import Layout
from btm_scale.launch.memory import activation_bytes, layer_input_bytes, rank_memory
from btm_scale.launch.step_time import HOST_COPIES
from gpu_counting.cases import CASES, Case
from gpu_counting.formula import PRODUCTS, attention_seconds

LENGTHS = (8_192, 32_768, 131_072)
LAYOUTS: dict[str, dict[str, Any]] = {
    "context 1": {},
    "context 4": {"context": 4},
    "context 8": {"context": 8},
    "tensor 8, sequence parallel": {"tensor": 8, "sequence_parallel": True},
    "tensor 8": {"tensor": 8},
}


def offload_counts() -> dict[str, dict[str, float]]:
    """Return bytes and seconds per GPU of one sequence of llama-3.1-8b in bf16, by layout and length."""
    rows = {}
    for length in LENGTHS:
        for name, settings in LAYOUTS.items():
            rows[f"{name}, {length:,} tokens"] = _counted(
                length, Layout(precision="bf16", recompute="tiled", **settings)
            )
    return rows


def _counted(length: int, layout: Layout) -> dict[str, float]:
    known = CASES["llama-3.1-8b"]
    case = Case(known.preset, 1, length, known.vocabulary)
    shape = case.shape
    offloaded = layout.model_copy(update={"offload_activations": True})
    own = layer_input_bytes(shape, layout, length / layout.context)
    # The forward pass is a third of forward and backward.
    products = 2.0 * shape.layer_matrices() / shape.layers * length / PRODUCTS
    forward = (products + attention_seconds(case) / shape.layers / 3) / layout.ranks
    size: dict[str, Any] = {"micro_batch": 1, "length": length}
    return {
        "layer_input_bytes": own,
        "copy_seconds": own / HOST_COPIES,
        "layer_seconds": forward,
        "kept_bytes": activation_bytes(shape, layout, **size),
        "offloaded_bytes": activation_bytes(shape, offloaded, **size),
        "host_bytes": rank_memory(shape, offloaded, accumulation=1, **size).host,
    }
