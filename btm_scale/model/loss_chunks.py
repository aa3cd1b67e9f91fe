"""How many tokens' logits the loss holds at a time, by device."""

from __future__ import annotations

# Each chunk reads the LM head twice and adds to its gradient, so on a GPU a chunk is as large as memory allows.
GPU_BYTES = 512 << 20
_GPU_TOKENS = 128  # a chunk is a multiple, for the blocks of the matrix products
# 8 MiB of float32 fit a core's cache.
_CPU_ELEMENTS = 2 << 20
_CPU_TOKENS = 16
# Rows begin at multiples of 128 bytes, which the matrix products and the kernels need for wide loads.
_GPU_ROW = 64


def tokens_per_chunk(tokens: int, rows: int, element_bytes: int, *, on_cpu: bool) -> int:
    """Return the tokens of a chunk of logits [tokens, rows]; all chunks but the last have as many."""
    if on_cpu:
        return max(_CPU_TOKENS, _CPU_ELEMENTS // rows)
    most = max(_GPU_TOKENS, GPU_BYTES // (row_elements(rows) * element_bytes))
    if tokens <= most:
        return tokens
    chunks = -(-tokens // (most // _GPU_TOKENS * _GPU_TOKENS))
    return -(-tokens // (chunks * _GPU_TOKENS)) * _GPU_TOKENS


def row_elements(rows: int) -> int:
    """Return the elements from one token's logits to the next one's on a GPU."""
    return -(-rows // _GPU_ROW) * _GPU_ROW
