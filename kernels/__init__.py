"""Scoring and mixing for forests of language models, without the logits in memory.

Two jobs: `token_logprobs` scores text under many experts from hidden states, and `mix_logits` / `mix_sample`
decode from the mixture of the experts. Tensors on a CUDA device go through Triton, others through the PyTorch
reference; with TRITON_INTERPRET=1 set before Triton is imported, CPU tensors run the Triton kernels too.
This package imports nothing else of btm_scale, and Triton only when a kernel is launched.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from types import ModuleType
from typing import cast

import torch
from torch import Tensor

from btm_scale.kernels import reference
from btm_scale.kernels.partials import Partials, finish, merge

__all__ = ["combine_partials", "mix_logits", "mix_sample", "token_logprob_partials", "token_logprobs"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def token_logprobs(
    hidden: Tensor,
    heads: Sequence[Tensor],
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
) -> Tensor:
    """Log-probability (nats) that each expert gives to each target token.

    log p_e(t) = logit_e[t, target_t] - log sum_v exp(logit_e[t, v]), with logit_e = hidden_e @ head_e.T in
    float32, or soft_cap * tanh(logit_e / soft_cap) where a soft cap is given.

    Args:
        hidden: [experts, tokens, hidden], bfloat16, float16 or float32.
        heads: one [vocab, hidden] tensor an expert; they may lie anywhere on the device of `hidden`.
        targets: int64 [tokens], each in [0, vocab_size) or equal to `ignore_index`.
        vocab_size: number of real vocabulary rows; rows from there on are padding. Default: all rows.
        ignore_index: targets with this value get exactly 0.
        soft_cap: bound of the logits, as in Gemma 2.

    Returns:
        float32 [experts, tokens], never above 0.

    Raises:
        ValueError: the shapes, types or devices do not belong together, or a target is out of range.
        FloatingPointError: a log-probability is NaN, because an input holds NaN or infinity.
    """
    if hidden.ndim != 3 or len(heads) != hidden.shape[0]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} with {len(heads)} heads; "
            "it must be [experts, tokens, hidden] with one head for each expert."
        )
    for head in heads:
        _check_projection(hidden[0], head, targets)
    if any(head.shape != heads[0].shape or head.dtype != heads[0].dtype for head in heads):
        raise ValueError("the heads differ in shape or type; score experts of different sizes one at a time.")
    rows = heads[0].shape[0] if vocab_size is None else min(vocab_size, heads[0].shape[0])
    outside = ((targets < 0) | (targets >= rows)) & (targets != ignore_index)
    log_probs = _backend(hidden).token_logprobs(
        hidden, heads, targets, vocab_size=vocab_size, ignore_index=ignore_index, soft_cap=soft_cap
    )
    # One look at the device for both questions, after the launch, so that checking costs one synchronisation.
    any_outside, any_nan = torch.stack([outside.any(), log_probs.isnan().any()]).tolist()
    if any_outside:
        wrong = int(targets[outside][0])
        raise ValueError(
            f"target {wrong} is not in the vocabulary; targets are 0 to {rows - 1}, or {ignore_index} to be ignored."
        )
    if any_nan:
        raise FloatingPointError(_nan_message(log_probs))
    return log_probs


def token_logprob_partials(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
) -> Partials:
    """What one vocabulary shard of one expert knows about the targets' log-probabilities.

    Under tensor parallelism every rank calls this with its rows of the head, the ranks gather the three small
    results, and `combine_partials` joins them.

    Args:
        hidden: [tokens, hidden], bfloat16, float16 or float32.
        head: [local rows, hidden], rows `vocab_start` to `vocab_start + local rows` of the vocabulary.
        targets: int64 [tokens], indices into the whole vocabulary, or `ignore_index`.
        vocab_start: vocabulary index of the first row of `head`.
        vocab_size: number of real rows of the whole vocabulary; later rows are padding and count as -inf.
        ignore_index: targets with this value combine to exactly 0.
        soft_cap: bound of the logits.

    Returns:
        float32 [tokens] each: the largest logit (-inf for a shard of padding), the sum of
        exp(logit - largest), and the target's logit (-inf where another shard holds it, +inf where ignored).

    Raises:
        ValueError: the shapes, types or devices do not belong together.
    """
    _check_projection(hidden, head, targets)
    return _backend(hidden).token_logprob_partials(
        hidden,
        head,
        targets,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        soft_cap=soft_cap,
    )


def combine_partials(partials: Sequence[Partials] | Partials) -> Tensor:
    """Log-probabilities (nats) from the partials of every vocabulary shard.

    Args:
        partials: one (maximum, sum_exp, target_logit) a shard in the order of the shards, each [tokens];
            or one such triple of stacked tensors [shards, tokens].

    Returns:
        float32 [tokens], never above 0, and 0 for ignored tokens. The shards are added first to last, so
        every rank gets the same bits. A target that no shard holds has log-probability -inf.

    Raises:
        FloatingPointError: a log-probability is NaN.
    """
    shards = cast(
        Sequence[Partials],
        list(zip(*partials, strict=True)) if isinstance(partials[0], Tensor) else partials,
    )
    total = shards[0]
    for shard in shards[1:]:
        total = merge(total, shard)
    log_probs = finish(*total)
    if log_probs.isnan().any():
        raise FloatingPointError(_nan_message(log_probs))
    return log_probs


def mix_logits(logits: Tensor, log_weights: Tensor) -> Tensor:
    """Log-probabilities (nats) of the mixture: log sum_e w_e softmax(logits_e).

    Args:
        logits: [experts, batch, vocab], bfloat16, float16 or float32; -inf rules a token out.
        log_weights: [batch, experts]; the weights are normalised here. An expert of weight -inf is not read.

    Returns:
        float32 [batch, vocab], never above 0. A row in which no expert has both weight and a possible token
        is all -inf; a row in which an expert with weight has a logit of NaN or +inf is all NaN.

    Raises:
        ValueError: the shapes, types or devices do not belong together.
    """
    _check_mixture(logits, log_weights)
    return _backend(logits).mix_logits(logits, log_weights)


def mix_sample(
    logits: Tensor,
    log_weights: Tensor,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    log_likelihood: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token a row from the mixture, with no vocabulary-sized result in memory.

    Args:
        logits: [experts, batch, vocab], as in `mix_logits`.
        log_weights: [batch, experts], as in `mix_logits`.
        temperature: draws from the mixture's probabilities to the power 1 / temperature; 0 takes the
            likeliest token.
        generator: source of randomness on the device of `logits`; the same state draws the same tokens on
            the same backend. Default: the global generator.
        log_likelihood: [batch, experts], float64 advised because float32 loses small gains in a long sum.
            Each expert's log-probability of the drawn token is added in place, in the launch that picks the
            token: the running posterior costs no pass of its own. Experts of zero weight are not read, and
            they and rows without a token are left as they are.

    Returns:
        tokens int64 [batch] and log_probs float32 [batch], the drawn token's log-probability (nats) under
        the mixture itself, at temperature 1. A row without any possible token gives (-1, -inf), and one that
        `mix_logits` would fill with NaN gives (-1, NaN).

    Raises:
        ValueError: the shapes, types or devices do not belong together, or the temperature is negative.
    """
    _check_mixture(logits, log_weights)
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature {temperature} is not a number of at least 0; 0 takes the likeliest token.")
    if log_likelihood is not None and log_likelihood.shape != log_weights.shape:
        raise ValueError(
            f"log_likelihood is {list(log_likelihood.shape)}; it must be [batch, experts] = {list(log_weights.shape)}."
        )
    return _backend(logits).mix_sample(
        logits, log_weights, temperature=temperature, generator=generator, log_likelihood=log_likelihood
    )


def _backend(tensor: Tensor) -> ModuleType:
    """The module whose functions compute for this tensor's device: the one place where that is decided."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (tensor.is_cuda or interpreted) or importlib.util.find_spec("triton") is None:
        return reference
    return importlib.import_module(".triton_launch", __name__)


def _check_projection(hidden: Tensor, head: Tensor, targets: Tensor) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or targets.ndim != 1:
        raise ValueError("hidden and heads must be matrices for each expert, and targets a vector.")
    if hidden.shape[1] != head.shape[1] or hidden.shape[0] != targets.shape[0]:
        raise ValueError(
            f"{hidden.shape[0]} tokens of size {hidden.shape[1]}, a head of size {head.shape[1]} and "
            f"{targets.shape[0]} targets do not fit: sizes and numbers of tokens must agree."
        )
    if hidden.dtype not in _FLOATS or head.dtype not in _FLOATS:
        raise ValueError(f"hidden is {hidden.dtype} and head {head.dtype}; use bfloat16, float16 or float32.")
    if not hidden.device == head.device == targets.device:
        raise ValueError(f"hidden, heads and targets must be on one device; hidden is on {hidden.device}.")


def _check_mixture(logits: Tensor, log_weights: Tensor) -> None:
    if logits.ndim != 3 or log_weights.shape != (logits.shape[1], logits.shape[0]):
        raise ValueError(
            f"logits are {list(logits.shape)} and log_weights {list(log_weights.shape)}; "
            "they must be [experts, batch, vocab] and [batch, experts]."
        )
    if logits.dtype not in _FLOATS or logits.device != log_weights.device:
        raise ValueError("logits must be bfloat16, float16 or float32, on the device of log_weights.")


def _nan_message(log_probs: Tensor) -> str:
    where = log_probs.isnan().nonzero()[0].tolist()
    return (
        f"the log-probability at index {where} is NaN: hidden states or head hold NaN or infinity there. "
        "Look for a diverged or damaged expert."
    )
