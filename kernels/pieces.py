"""How the launches divide a problem, without Triton: for the launches themselves and for their cost."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from torch import Tensor

from btm_scale.kernels.tuning_table import ScoreConfig

PARTIAL_BYTES = 16 << 20  # memory for partials per launch; more experts or tokens take more launches
COMBINE_BLOCK, COMBINE_SPLITS = 32, 64


def ceil_div(number: int, divisor: int) -> int:
    """Return number / divisor, rounded up."""
    return -(-number // divisor)


def real_columns(head_rows: int, vocab_start: int, vocab_size: int | None) -> int:
    """Return how many rows of a head, which starts at `vocab_start`, are vocabulary and not padding."""
    return head_rows if vocab_size is None else max(0, min(head_rows, vocab_size - vocab_start))


@functools.lru_cache(maxsize=1024)
def split_columns(tokens: int, columns: int, config: ScoreConfig, multiprocessors: int) -> int:
    """Return the vocabulary columns of one program, a multiple of its blocks and at most the config's split.

    Chosen for one expert so that the programs fill the multiprocessors in whole waves; more experts are more waves. A
    program costs as much as its blocks and one more, in which its pipeline fills and its partial results are written.
    """
    slots = multiprocessors * config.resident
    token_blocks, blocks = ceil_div(tokens, config.block_t), max(1, ceil_div(columns, config.block_v))

    def time(size: int) -> int:
        return ceil_div(token_blocks * ceil_div(blocks, size), slots) * (size + 1)

    most = max(1, min(blocks, config.split // config.block_v))
    return config.block_v * min(range(most, 0, -1), key=time)


def score_pieces(experts: int, tokens: int, splits: int, config: ScoreConfig) -> Iterator[tuple[slice, slice]]:
    """Yield the experts and tokens of each launch, so that the partials of one need at most PARTIAL_BYTES."""
    token_step = max(1, min(tokens, max(config.block_t, PARTIAL_BYTES // (12 * splits))))
    expert_step = max(1, PARTIAL_BYTES // (12 * splits * token_step))
    for first in range(0, experts, expert_step):
        for start in range(0, tokens, token_step):
            yield slice(first, min(first + expert_step, experts)), slice(start, min(start + token_step, tokens))


def row_alignment(hidden: Tensor, heads: Sequence[Tensor]) -> int:
    """Return 16 if every row of every tensor starts at a multiple of 16 bytes, otherwise the size of an element."""
    return min(_alignment(tensor) for tensor in [hidden, *heads])


def _alignment(tensor: Tensor) -> int:
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()[:-1]]
    return 16 if all(value % 16 == 0 for value in (tensor.data_ptr(), *strides)) else size
