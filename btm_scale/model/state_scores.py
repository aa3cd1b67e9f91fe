"""Log-probabilities of text from hidden states: one launch for all models of a decoder, and no logits in memory.

This is for 16-bit models on NVIDIA GPUs, where the kernel multiplies on tensor cores and adds in float32. Elsewhere the
logits are formed and normalized, which PyTorch does faster on a CPU than the kernel's reference.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from btm_scale.kernels import kernel_path, token_logprobs
from btm_scale.model.float32_head import Float32Head, StackedFloat32Head, adds_in_float32

if TYPE_CHECKING:
    from btm_scale.model.hf_decoder import Decoder

_TRIED_TOKENS = 2
_IGNORED = -100


class StateScores:
    """The body and the output projections of a decoder's models, for models whose logits are the projections'."""

    def __init__(self, decoder: Decoder) -> None:
        self._body, self._vocabulary, self._models = decoder.model.base_model, decoder.vocabulary, decoder.models
        self._head = decoder.model.get_output_embeddings
        config = decoder.model.config.get_text_config()
        self._soft_cap: float | None = getattr(config, "final_logit_softcapping", None) or None
        self._takes = inspect.signature(self._body.forward).parameters

    def states(self, ids: Tensor, *, mask: Tensor | None, positions: Tensor, cache: Any) -> Tensor:
        """Return hidden states [..., hidden] of tokens [models x batch, tokens], and append them to a cache if any."""
        inputs = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
        inputs |= {"use_cache": cache is not None}
        output = self._body(input_ids=ids, **{name: value for name, value in inputs.items() if name in self._takes})
        states: Tensor = output.last_hidden_state
        return states

    def logits(self, states: Tensor) -> Tensor:
        """Return float32 logits [..., vocabulary] of hidden states [models x batch, ..., hidden]."""
        logits: Tensor = self._head()(states)
        if self._soft_cap is not None:
            logits = torch.tanh(logits / self._soft_cap) * self._soft_cap
        return logits[..., : self._vocabulary]

    def log_probs(self, states: Tensor, targets: Tensor, mask: Tensor | None) -> Tensor:
        """Return the log-probability in nats of each target under each model, float32 [models x batch, tokens].

        Args:
            states: [models x batch, tokens, hidden].
            targets: int64 [batch, tokens].
            mask: bool [batch, tokens], False for targets that get 0. Default: all are scored.

        Raises `FloatingPointError` if a log-probability is NaN.
        """
        if mask is not None:
            targets = targets.masked_fill(~mask, _IGNORED)
            states = states.masked_fill(~mask.repeat(self._models, 1).unsqueeze(2), 0.0)  # padding may give NaN
        weight: Tensor = self._head().weight
        rows = states.reshape(self._models, -1, states.shape[-1])
        log_probs = token_logprobs(
            rows,
            list(weight) if weight.ndim == 3 else [weight],
            targets.reshape(-1),
            vocab_size=self._vocabulary,
            soft_cap=self._soft_cap,
        )
        return log_probs.view(states.shape[:2])


def state_scores_of(decoder: Decoder) -> StateScores | None:
    """Return what scores a decoder's text from hidden states; None where logits are formed instead.

    Some classes scale the logits or change the states before the projection, which is found by comparing logits.
    """
    model = decoder.model
    head = model.get_output_embeddings()
    if not isinstance(head, Float32Head | StackedFloat32Head) or head.bias is not None or model.base_model is model:
        return None
    if not has_kernel(head.weight):
        return None
    scores = StateScores(decoder)
    if head.weight.is_meta:
        return scores
    ids = torch.arange(_TRIED_TOKENS, device=model.device).remainder(decoder.vocabulary).repeat(decoder.models, 1)
    positions = torch.arange(_TRIED_TOKENS, device=model.device).repeat(decoder.models, 1)
    logits = decoder.logits(ids, mask=None, positions=positions, cache=None, keep=0)
    states = scores.states(ids, mask=None, positions=positions, cache=None)
    is_equal = torch.allclose(scores.logits(states), logits, rtol=0.0, atol=0.0, equal_nan=True)
    return scores if is_equal else None


def has_kernel(weight: Tensor) -> bool:
    """Return whether the kernel is the best way to score with these weights of a head; `meta` counts as a GPU."""
    return adds_in_float32(weight) and (weight.is_meta or kernel_path(weight.device) == "triton")
