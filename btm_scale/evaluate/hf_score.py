"""Score text with models that transformers computes, in this process.

`TransformersModel` scores the experts of a run that Megatron-core does not compute here, in the group that
`evaluate/score.py` runs in. `block_log_probs` is for `ablate`, which starts no group and writes nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from btm_scale.checkpoint.expected import FAMILIES_WITH_TENSORS
from btm_scale.errors import CheckpointError
from btm_scale.forest.posterior.mixture import blocks_of
from btm_scale.kernels import combine_partials, token_logprob_partials
from btm_scale.model.hf_decoder import Decoder, positions_of
from btm_scale.model.hf_load import load_causal_lm

_BATCH_TOKENS = 4096
_TRIED_TOKENS = 16
# How much log-probabilities of the same tokens may differ: kernels of other tokens may add in a different order.
_ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class TransformersModel:
    """A causal LM of any family that transformers computes, on one rank."""

    def __init__(self, directory: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        """Load a Hugging Face directory.

        Raises `CheckpointError` if transformers cannot load it, or if its predictions depend on later tokens.
        """
        model = load_causal_lm(directory, dtype).to(device).eval()
        config = model.config.get_text_config()
        self._vocabulary: int = config.vocab_size
        self._soft_cap: float | None = getattr(config, "final_logit_softcapping", None)
        # Of other families the logits may have a bias, a scale or whatever else their class computes.
        self.uses_kernels = config.model_type in FAMILIES_WITH_TENSORS
        self._body, self._head = model.base_model, model.get_output_embeddings()
        self._decoder = None if self.uses_kernels else Decoder(model)
        tried = min(_TRIED_TOKENS, positions_of(config))
        self._require_causal(directory, torch.arange(tried, device=device) % self._vocabulary, _ROUNDING[dtype])

    @torch.no_grad()
    def log_probs(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return the log-probability in nats of each target after its inputs: float32, of int64 [batch, tokens]."""
        if self._decoder is not None:
            rows = zip(inputs.split(1), targets, strict=True)
            return torch.cat([self._from_logits(row, target) for row, target in rows])
        hidden = self._body(input_ids=inputs, use_cache=False).last_hidden_state
        partials = token_logprob_partials(
            hidden.reshape(-1, hidden.shape[-1]),
            self._head.weight,
            targets.reshape(-1),
            vocab_size=self._vocabulary,
            soft_cap=self._soft_cap,
        )
        return combine_partials([partials]).view_as(targets)

    def _from_logits(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Return [1, tokens] of one sequence, whose logits are materialized."""
        assert self._decoder is not None
        positions = torch.arange(inputs.shape[1], device=inputs.device)[None]
        logits = self._decoder.logits(inputs, mask=None, positions=positions, cache=None, keep=0)[0]
        return (logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)).clamp_(max=0.0)[None]

    def _require_causal(self, directory: Path, tokens: Tensor, rounding: float) -> None:
        """Raise `CheckpointError` if another last token changes the predictions of the tokens before it."""
        others = tokens.clone()
        others[-1] = (tokens[-1] + 1) % self._vocabulary
        before, after = (self.log_probs(row[None], tokens[None])[0, :-1] for row in (tokens, others))
        if not torch.allclose(before, after, rtol=rounding, atol=rounding, equal_nan=True):
            raise CheckpointError(
                f"{directory} is not a causal LM: its predictions depend on later tokens. Only models that predict "
                "each token from those before it can be experts. Choose another model."
            )


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
        scored = decoder.score([tokens[begin : end + 1].tolist() for begin, end in batch])
        for (begin, end), row in zip(batch, scored.cpu().numpy(), strict=True):
            result[begin:end] = row[len(row) - (end - begin) :]
    return result
