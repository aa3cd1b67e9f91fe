"""A text's log-probabilities under a model in this process, for `ablate`: no group is started and nothing is kept.

The scores that a run keeps come from `evaluate/score.py`, which runs the trained model in a group.
"""

from __future__ import annotations

import numpy as np

from btm_scale.forest.posterior.mixture import blocks_of
from btm_scale.model.hf_decoder import Decoder

_BATCH_TOKENS = 4096


def block_log_probs(decoder: Decoder, tokens: np.ndarray, block_starts: np.ndarray) -> np.ndarray:
    """Log-probability in nats of every target, float32 [targets], of tokens [targets + 1].

    Each block starts with no context but its own first token; it may be as long as the model can read.
    """
    result = np.empty(len(tokens) - 1, dtype=np.float32)
    blocks = blocks_of(block_starts, len(result))
    longest = max(end - begin for begin, end in blocks)
    if longest > decoder.positions:
        raise ValueError(f"a block of {longest} tokens is longer than the model can read, {decoder.positions}")
    at_once = max(1, _BATCH_TOKENS // longest)
    for first in range(0, len(blocks), at_once):
        batch = blocks[first : first + at_once]
        scored = decoder.read([tokens[begin : end + 1].tolist() for begin, end in batch]).log_probs
        assert scored is not None
        for (begin, end), row in zip(batch, scored.cpu().numpy(), strict=True):
            result[begin:end] = row[len(row) - (end - begin) :]
    return result
