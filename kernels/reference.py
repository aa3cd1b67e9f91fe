"""PyTorch reference of the kernels, for machines without a GPU, tests and benchmarks.

Logits are float32 and exist for one block at a time, so memory does not grow with tokens x vocabulary x experts, and a
block is still in the cache when its exponentials are summed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from btm_scale.kernels.partials import NO_TOKEN, Partials, finish, normalized

TOKEN_BLOCK = 512
VOCAB_BLOCK = 2048
_INF = float("inf")


def token_logprobs(
    hidden: Tensor,
    heads: Sequence[Tensor],
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
) -> Tensor:
    """See `btm_scale.kernels.token_logprobs`, except that NaN is returned instead of raised."""
    return torch.stack(
        [
            finish(
                *token_logprob_partials(
                    rows, head, targets, vocab_size=vocab_size, ignore_index=ignore_index, soft_cap=soft_cap
                )
            )
            for rows, head in zip(hidden, heads, strict=True)
        ]
    )


@torch.no_grad()
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
    """See `btm_scale.kernels.token_logprob_partials`."""
    tokens, columns = hidden.shape[0], head.shape[0]
    if vocab_size is not None:
        columns = max(0, min(columns, vocab_size - vocab_start))
    maximum = torch.full((tokens,), -_INF, device=hidden.device)
    sum_exp = torch.zeros(tokens, device=hidden.device)
    target_logit = torch.where(targets == ignore_index, _INF, -_INF)
    local_targets = targets - vocab_start
    buffer = torch.empty(min(tokens, TOKEN_BLOCK) * min(columns, VOCAB_BLOCK), device=hidden.device)

    with _exact_products(hidden, head):
        for first in range(0, columns, VOCAB_BLOCK):
            weight = head[first : min(first + VOCAB_BLOCK, columns)].float().T
            width = weight.shape[1]
            for start in range(0, tokens, TOKEN_BLOCK):
                block = slice(start, min(start + TOKEN_BLOCK, tokens))
                rows = hidden[block].float()
                logits = torch.mm(rows, weight, out=buffer[: rows.shape[0] * width].view(-1, width))
                if soft_cap is not None:
                    logits.div_(soft_cap).tanh_().mul_(soft_cap)

                column = local_targets[block] - first
                here = (column >= 0) & (column < width) & (targets[block] != ignore_index)
                at_target = logits.gather(1, column.clamp(0, width - 1).unsqueeze(1)).squeeze(1)
                target_logit[block] = torch.where(here, at_target, target_logit[block])

                new_maximum = torch.maximum(maximum[block], logits.amax(1))
                shift = new_maximum.masked_fill(new_maximum == -_INF, 0.0)  # (-inf) - (-inf) would be NaN
                carried = sum_exp[block] * (maximum[block] - shift).exp_()
                sum_exp[block] = carried + logits.sub_(shift.unsqueeze(1)).exp_().sum(1)
                maximum[block] = new_maximum
    return maximum, sum_exp, target_logit


@torch.no_grad()
def mix_logits(logits: Tensor, log_weights: Tensor) -> Tensor:
    """See `btm_scale.kernels.mix_logits`."""
    _, batch, vocabulary = logits.shape
    log_weights = normalized(log_weights)
    maximum, log_sum = _normalizers(logits, log_weights)
    mixture = torch.empty(batch, vocabulary, device=logits.device)
    for first in range(0, vocabulary, VOCAB_BLOCK):
        block = slice(first, first + VOCAB_BLOCK)
        mixture[:, block] = _mixture_block(logits[:, :, block], log_weights, maximum, log_sum)
    return mixture


@torch.no_grad()
def mix_sample(
    logits: Tensor,
    log_weights: Tensor,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    log_likelihood: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.mix_sample`."""
    experts, batch, vocabulary = logits.shape
    log_weights = normalized(log_weights)
    maximum, log_sum = _normalizers(logits, log_weights)
    best = torch.full((batch,), -_INF, device=logits.device)
    tokens = torch.full((batch,), NO_TOKEN, device=logits.device)
    log_probs = torch.full((batch,), -_INF, device=logits.device)
    for first in range(0, vocabulary, VOCAB_BLOCK):
        mixture = _mixture_block(logits[:, :, first : first + VOCAB_BLOCK], log_weights, maximum, log_sum)
        score = mixture
        if temperature > 0:
            # Gumbel-max: the argmax of log p / temperature + noise is a sample from p ** (1 / temperature).
            noise = torch.empty_like(mixture).exponential_(generator=generator).log_().neg_()
            score = mixture / temperature + noise
        block_best, column = score.max(1)
        better = block_best > best
        best = torch.where(better, block_best, best)
        tokens = torch.where(better, first + column, tokens)
        log_probs = torch.where(better, mixture.gather(1, column.unsqueeze(1)).squeeze(1), log_probs)
    broken = log_sum.isnan().any(0) | log_weights.isnan().any(1)
    tokens = tokens.masked_fill(broken, NO_TOKEN)
    log_probs = log_probs.masked_fill(broken, float("nan"))

    if log_likelihood is not None:
        drawn = tokens.clamp_min(0).expand(experts, batch).unsqueeze(2)
        gain = (logits.gather(2, drawn).squeeze(2).float() - maximum) - log_sum
        valid = (tokens != NO_TOKEN).unsqueeze(1) & (log_weights > -_INF)
        log_likelihood += torch.where(valid, gain.T, 0.0).to(log_likelihood.dtype)
    return tokens, log_probs


def _normalizers(logits: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return each expert's maximum logit and log sum exp(logit - maximum), both float32 [experts, batch].

    They are kept apart because their sum would round: at logits of 1e4 float32 resolves 1e-3 nats. An expert of zero
    weight gets (0, +inf), so its logits, even NaN, cannot affect the mixture.
    """
    experts, batch, vocabulary = logits.shape
    maximum = torch.full((experts, batch), -_INF, device=logits.device)
    sum_exp = torch.zeros(experts, batch, device=logits.device)
    for first in range(0, vocabulary, VOCAB_BLOCK):
        block = logits[:, :, first : first + VOCAB_BLOCK].float()
        new_maximum = torch.maximum(maximum, block.amax(2))
        shift = new_maximum.masked_fill(new_maximum == -_INF, 0.0)
        sum_exp = sum_exp * (maximum - shift).exp_() + (block - shift.unsqueeze(2)).exp_().sum(2)
        maximum = new_maximum
    silent = (log_weights.T == -_INF) | (sum_exp == 0)
    return maximum.masked_fill(silent, 0.0), sum_exp.log().masked_fill(silent, _INF)


def _mixture_block(logits: Tensor, log_weights: Tensor, maximum: Tensor, log_sum: Tensor) -> Tensor:
    """Return log sum_e w_e softmax(logits_e) for one block of the vocabulary, float32 [batch, columns]."""
    silent = (log_sum == _INF).unsqueeze(2)
    terms = (logits.float() - maximum.unsqueeze(2)) + (log_weights.T - log_sum).unsqueeze(2)
    return terms.masked_fill(silent, -_INF).logsumexp(0).clamp_(max=0.0)


@contextlib.contextmanager
def _exact_products(hidden: Tensor, head: Tensor) -> Iterator[None]:
    """Compute float32 products in full float32, whatever precision the process has set.

    float32 copies of bfloat16 tensors may use the CPU's bfloat16 units, which are several times faster: inputs are
    representable, products exact and sums float32, so nothing is rounded. PyTorch versions without the setting use
    plain float32.
    """
    backends: Any = torch.backends.cuda if hidden.is_cuda else torch.backends.mkldnn
    matmul = getattr(backends, "matmul", None)
    if matmul is None or not hasattr(matmul, "fp32_precision"):
        yield
        return
    before = matmul.fp32_precision
    in_bfloat16 = hidden.dtype == head.dtype == torch.bfloat16 and not hidden.is_cuda
    matmul.fp32_precision = "bf16" if in_bfloat16 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before
