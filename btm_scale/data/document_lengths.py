"""The lengths of the documents in a training sample, from the index alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from megatron.core.datasets.gpt_dataset import GPTDataset

from btm_scale.data.chat.sequences import ChatSequences

Array = np.ndarray[Any, Any]


def lengths_in_sample(domain: GPTDataset | ChatSequences, number: int) -> Array:
    """Return the tokens of each document, or part of one, in the inputs of a sample of a domain, int64 [documents].

    They sum to the sequence length. The padding after conversations is a document.
    """
    if isinstance(domain, ChatSequences):
        return domain.lengths_in(number)
    position = domain.shuffle_index[number]
    (first, begin), (last, end) = domain.sample_index[position], domain.sample_index[position + 1]
    lengths: Array = domain.dataset.sequence_lengths[domain.document_index[first : last + 1]].astype(np.int64)
    lengths[-1] = end
    lengths[0] -= begin
    return lengths[lengths > 0]
