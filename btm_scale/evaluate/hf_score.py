"""Score a text with a Hugging Face model in this process, for `ablate`: starts no group and writes nothing.

The scores of a run come from `evaluate/score.py`, which runs the trained model in a group.
"""

from __future__ import annotations

import numpy as np

from btm_scale.forest.posterior.mixture import blocks_of
from btm_scale.model.hf_decoder import Decoder

_BATCH_TOKENS = 4096


def block_log_probs(decoder: Decoder, tokens: np.ndarray, block_starts: np.ndarray) -> np.ndarray:
    """Return the log-probability in nats of every target, float32 [targets], of tokens [targets + 1].

    The context of a block starts with its own first token. Raises ValueError for a block longer than the model's
    positions.
    """
    result = np.empty(len(tokens) - 1, dtype=np.float32)
    blocks = blocks_of(block_starts, len(result))
    longest = max(end - begin for begin, end in blocks)
    if longest > decoder.positions:
        raise ValueError(f"a block of {longest} tokens exceeds the model's {decoder.positions} positions")
    at_once = max(1, _BATCH_TOKENS // longest)
    for first in range(0, len(blocks), at_once):
        batch = blocks[first : first + at_once]
        scored = decoder.read([tokens[begin : end + 1].tolist() for begin, end in batch]).log_probs
        assert scored is not None
        for (begin, end), row in zip(batch, scored.cpu().numpy(), strict=True):
            result[begin:end] = row[len(row) - (end - begin) :]
    return result
