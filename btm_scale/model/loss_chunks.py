"""How many tokens' logits the loss holds at a time, by device."""

from __future__ import annotations

# Each chunk reads the LM head twice and adds to its gradient, so on a GPU a chunk is as large as memory allows.
GPU_BYTES = 512 << 20
_GPU_TOKENS = 128  # chunks are multiples of it, for the blocks of the matrix products
# 8 MiB of float32 fit a core's cache.
_CPU_ELEMENTS = 2 << 20
_CPU_TOKENS = 16
# Rows begin at multiples of 128 bytes, which the matrix products and the kernels need for wide loads.
_GPU_ROW = 64


def tokens_per_chunk(tokens: int, rows: int, element_bytes: int, *, on_cpu: bool) -> int:
    """Return the number of tokens in a chunk of logits [tokens, rows]; the last chunk may have fewer.

    `element_bytes` is the size of a logit. On a GPU, `tokens` that fit one chunk are one chunk.
    """
    if on_cpu:
        return max(_CPU_TOKENS, _CPU_ELEMENTS // rows)
    limit = max(_GPU_TOKENS, GPU_BYTES // (row_elements(rows) * element_bytes))
    if tokens <= limit:
        return tokens
    chunks = -(-tokens // (limit // _GPU_TOKENS * _GPU_TOKENS))
    return -(-tokens // (chunks * _GPU_TOKENS)) * _GPU_TOKENS


def row_elements(rows: int) -> int:
    """Return the row stride of logits [tokens, rows] on a GPU, in elements."""
    return -(-rows // _GPU_ROW) * _GPU_ROW
