"""Score and mix many language models without materializing their logits.

`token_logprobs` scores text under many experts from their hidden states; `mix_logits` and `mix_sample` decode from
their mixture; `cross_entropy_` turns logits into the gradient of training's loss; `add_norm` and `split_rotated` fuse
elementwise operations of a layer. CUDA and ROCm tensors use Triton, others the PyTorch reference; if TRITON_INTERPRET=1
is set before Triton is imported, CPU tensors run the Triton kernels as well. `last_path` says which ran, `cost` what
the launches move. The package imports nothing else of btm_scale, and Triton only to launch a kernel.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from btm_scale.kernels import operators
from btm_scale.kernels.checks import (
    check_heads,
    check_mixture,
    check_projection,
    check_sampling,
    check_scoring,
    refuse_target,
)
from btm_scale.kernels.cost import Cost, cost
from btm_scale.kernels.hardware import is_interpreted
from btm_scale.kernels.layer_operators import (
    add_norm,
    add_norm_backward,
    bias_gelu_backward,
    join_rotated,
    split_rotated,
)
from btm_scale.kernels.loss_operators import cross_entropy_, logit_gradient_, logit_partials
from btm_scale.kernels.partials import Partials, combine_partials, refuse_nan
from btm_scale.kernels.paths import KernelPath, last_path
from btm_scale.kernels.products import add_product_

__all__ = [
    "Cost",
    "KernelPath",
    "add_norm",
    "add_norm_backward",
    "add_product_",
    "bias_gelu_backward",
    "combine_partials",
    "cost",
    "cross_entropy_",
    "join_rotated",
    "kernel_path",
    "last_path",
    "logit_gradient_",
    "logit_partials",
    "mix_logits",
    "mix_sample",
    "split_rotated",
    "token_logprob_partials",
    "token_logprobs",
]


@torch.no_grad()
def token_logprobs(
    hidden: Tensor,
    heads: Sequence[Tensor],
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
) -> Tensor:
    """Return the log-probability in nats of each target token under each expert.

    log p_e(t) = logit_e[t, target_t] - log sum_v exp(logit_e[t, v]), with logit_e = hidden_e @ head_e.T in float32, or
    soft_cap * tanh(logit_e / soft_cap) with a soft cap.

    Args:
        hidden: [experts, tokens, hidden], bfloat16, float16 or float32.
        heads: one [vocab, hidden] tensor per expert, anywhere on the device of `hidden`.
        targets: int64 [tokens], each in [0, vocab_size) or equal to `ignore_index`.
        vocab_size: number of real vocabulary rows; later rows are padding. Default: all rows.
        ignore_index: targets with this value get exactly 0.
        soft_cap: bound of the logits, as in Gemma 2.

    Returns:
        float32 [experts, tokens], never above 0.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or a target is out of range.
        FloatingPointError: a log-probability is NaN, because an input contains NaN or infinity.
    """
    check_heads(hidden, heads, targets)
    check_scoring(vocab_size, soft_cap)
    rows = heads[0].shape[0] if vocab_size is None else min(vocab_size, heads[0].shape[0])
    outside = ((targets < 0) | (targets >= rows)) & (targets != ignore_index)
    log_probs: Tensor = operators.TOKEN_LOGPROBS(hidden, heads, targets, vocab_size, ignore_index, soft_cap)
    if not _has_values(log_probs):
        return log_probs
    # Both checks after the launch and in one transfer, so that they cost one synchronization.
    any_outside, any_nan = torch.stack([outside.any(), log_probs.isnan().any()]).tolist()
    if any_outside:
        refuse_target(int(targets[outside][0]), rows, ignore_index)
    if any_nan:
        refuse_nan(log_probs)
    return log_probs


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
    """Return one vocabulary shard's partial results for the targets' log-probabilities under one expert.

    Under tensor parallelism every rank calls this with its rows of the head, the ranks gather the three small results,
    and `combine_partials` joins them.

    Args:
        hidden: [tokens, hidden], bfloat16, float16 or float32.
        head: [local rows, hidden], rows `vocab_start` to `vocab_start + local rows` of the vocabulary.
        targets: int64 [tokens], indices into the full vocabulary, or `ignore_index`.
        vocab_start: vocabulary index of the first row of `head`.
        vocab_size: number of real rows of the full vocabulary; later rows are padding and count as -inf.
        ignore_index: targets with this value combine to exactly 0.
        soft_cap: bound of the logits, as in Gemma 2.

    Returns:
        float32 [tokens] each: the maximum logit (-inf for a shard of padding), the sum of exp(logit - maximum), and
        the target's logit (-inf if another shard has it, +inf if ignored).

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_projection(hidden, head, targets)
    check_scoring(vocab_size, soft_cap, vocab_start)
    partials: Partials = operators.TOKEN_LOGPROB_PARTIALS(
        hidden, head, targets, vocab_start, vocab_size, ignore_index, soft_cap
    )
    return partials


@torch.no_grad()
def mix_logits(logits: Tensor, log_weights: Tensor) -> Tensor:
    """Return the log-probabilities in nats of the mixture: log sum_e w_e softmax(logits_e).

    Args:
        logits: [experts, batch, vocab], bfloat16, float16 or float32; -inf excludes a token.
        log_weights: [batch, experts], normalized here. An expert with log weight -inf is not read.

    Returns:
        float32 [batch, vocab], never above 0. A row in which no expert has both weight and a possible token is all
        -inf; a row in which an expert with weight has a logit of NaN or +inf is all NaN.

    Raises:
        ValueError: shapes, dtypes or devices do not match.
    """
    check_mixture(logits, log_weights)
    mixture: Tensor = operators.MIX_LOGITS(logits, log_weights)
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
    """Sample one token per row from the mixture, without a vocabulary-sized result in memory.

    Args:
        logits: [experts, batch, vocab], as in `mix_logits`.
        log_weights: [batch, experts], as in `mix_logits`.
        temperature: samples from the mixture's probabilities to the power 1 / temperature; 0 takes the most likely
            token.
        generator: RNG on the device of `logits`; the same state gives the same tokens on the same backend. Default:
            the global generator.
        log_likelihood: [batch, experts], preferably float64, since float32 loses small terms of a long sum. Each
            expert's log-probability of the sampled token is added in place, in the launch that picks the token, so the
            running posterior needs no extra pass. Experts of zero weight and rows without a token are not changed. It
            may be `log_weights` itself, which then becomes the posterior, up to normalization.

    Returns:
        tokens int64 [batch] and log_probs float32 [batch], the sampled token's log-probability in nats under the
        mixture at temperature 1. A row without a possible token gives (-1, -inf); one that `mix_logits` would fill
        with NaN gives (-1, NaN).

    Raises:
        ValueError: shapes, dtypes or devices do not match, or the temperature is negative or not finite.
    """
    check_mixture(logits, log_weights)
    check_sampling(log_weights, temperature, generator, log_likelihood)
    sampled: tuple[Tensor, Tensor] = operators.MIX_SAMPLE(logits, log_weights, temperature, generator, log_likelihood)
    return sampled


def kernel_path(device: torch.device) -> str:
    """Return `triton` or `reference`: what computes these functions for tensors on a device, unless a launch fails.

    `last_path` says what computed the last one.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    return "triton" if has_triton and (device.type == "cuda" or is_interpreted()) else "reference"


def _has_values(tensor: Tensor) -> bool:
    """Return whether there are numbers to check; a `meta` or fake tensor has a shape only."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))
