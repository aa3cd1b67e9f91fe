"""Utilization that counted bytes and operations would give on a GPU.

Products at 650 TFLOP/s of 989; attention 14 ms for llama-1.3b with 4 x 2048 tokens, and by layers, width and the square
of the length otherwise; everything else at the memory's practical bandwidth; 4 ms for the rest of a micro-batch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from gpu_counting.cases import CASES, Case

PEAK, PRODUCTS = 989e12, 650e12  # bfloat16 operations/s
BANDWIDTH = {"H100": 2.8e12, "H200": 4.0e12}  # bytes/s
_ATTENTION_SECONDS, _REST_SECONDS = 14e-3, 4e-3


@dataclass(frozen=True)
class Bytes:
    """What a micro-batch moves: the loss with and without its products, all layers without products, gradient sums."""

    loss: float
    loss_besides_products: float
    layers: float
    sums: float


def milliseconds(case: Case, moved: Bytes, gpu: str) -> dict[str, float]:
    """Return the time of each part of a micro-batch."""
    shape, bandwidth = case.shape, BANDWIDTH[gpu]
    head = 6.0 * case.tokens * case.vocabulary * shape.hidden / PRODUCTS
    attention = 6.0 * shape.layers * shape.query_width * case.length * case.tokens
    body = shape.flops_per_token(case.length) * case.tokens - attention - head * PRODUCTS
    # Small chunks make products that wait for memory.
    products_of_loss = max(head, (moved.loss - moved.loss_besides_products) / bandwidth)
    seconds = {
        "products": body / PRODUCTS,
        "attention": attention_seconds(case),
        "elementwise": moved.layers / bandwidth,
        "loss": products_of_loss + moved.loss_besides_products / bandwidth,
        "gradient sums": moved.sums / bandwidth,
        "rest": _REST_SECONDS,
    }
    return {part: 1e3 * value for part, value in seconds.items()}


def float8_seconds(case: Case, added: float) -> dict[str, object]:
    """Return what float8 saves and costs in a micro-batch of all layers, which move `added` bytes more in each.

    Two of a layer's three products, by FLOPs, run at twice the rate of bfloat16, as its peak is by the data sheets.
    """
    matrices = 6.0 * case.shape.layer_matrices() * case.tokens
    costs = {gpu: case.shape.layers * added / bandwidth for gpu, bandwidth in BANDWIDTH.items()}
    return {"saved": 2 / 3 * matrices / PRODUCTS / 2, "added": costs}


def utilization(case: Case, moved: Bytes) -> dict[str, dict[str, object]]:
    """Return model FLOPs utilization by GPU, with the time of each part."""
    flops = case.shape.flops_per_token(case.length) * case.tokens
    rows: dict[str, dict[str, object]] = {}
    for gpu in BANDWIDTH:
        parts = milliseconds(case, moved, gpu)
        rows[gpu] = {"utilization": flops / PEAK / (sum(parts.values()) / 1e3), "milliseconds": parts}
    return rows


def attention_seconds(case: Case) -> float:
    """Return the time of all layers' attention, forward and backward."""
    return _ATTENTION_SECONDS * _attention(case) / _attention(CASES["llama-1.3b"])


def described(moved: Bytes) -> dict[str, float]:
    """Return the bytes by part."""
    return asdict(moved)


def _attention(case: Case) -> float:
    return case.shape.layers * case.shape.query_width * case.sequences * float(case.length) ** 2
