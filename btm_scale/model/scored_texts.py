"""Texts that are scored and not continued."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from btm_scale.model import reading

if TYPE_CHECKING:
    from btm_scale.model.hf_decoder import Decoder


def scored(decoder: Decoder, texts: Sequence[Sequence[int]]) -> Tensor:
    """See Decoder.score. Texts are read in groups; without logits in memory, they need no KV cache either."""
    has_states, longest = decoder.state_scores is not None, max(map(len, texts))
    numbers = decoder.models * longest * (decoder.hidden if has_states else decoder.vocabulary)
    rows = max(1, (reading.MAX_STATES if has_states else reading.MAX_LOGITS) // numbers)
    found = []
    for first in range(0, len(texts), rows):
        group = reading.Reading(decoder, texts[first : first + rows], True, is_continued=not has_states)
        assert group.log_probs is not None
        log_probs = group.log_probs.unflatten(0, (decoder.models, -1))
        found.append(nn.functional.pad(log_probs, (longest - 1 - log_probs.shape[2], 0)))
    return torch.cat(found, dim=1).flatten(0, 1)
