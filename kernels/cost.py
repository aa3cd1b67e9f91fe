"""What an operator's Triton launches cost: their number, and the bytes that they read and write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from btm_scale.kernels.hardware import Hardware, hardware
from btm_scale.kernels.layer_cost import LAYER_COSTS
from btm_scale.kernels.loss_tuning import LossConfig, cross_entropy_configs
from btm_scale.kernels.pieces import ceil_div, real_columns, row_alignment, score_pieces, split_columns
from btm_scale.kernels.tuning import mix_configs, score_configs
from btm_scale.kernels.tuning_table import MixConfig, ScoreConfig

_PARTIALS = 12  # bytes of (maximum, sum_exp, target logit), and of (score, token, log-probability)
_NORMALIZER = 8  # bytes of (maximum, sum_exp)
_FLOAT, _INT = 4, 8


class Cost(NamedTuple):
    """Kernel launches, and bytes if each launch reads every input element once and writes every output element once.

    Blocks that read the same rows are assumed to share them in the cache, so a GPU may read more.
    """

    launches: int
    bytes_read: int
    bytes_written: int

    def __add__(self, other: object) -> Cost:
        """Return the sum of two costs."""
        if not isinstance(other, Cost):
            return NotImplemented
        return Cost(*(mine + theirs for mine, theirs in zip(self, other, strict=True)))


def cost(
    operator: str,
    *tensors: Tensor | Sequence[Tensor] | bool | float | None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    config: ScoreConfig | MixConfig | LossConfig | None = None,
    on: Hardware | None = None,
) -> Cost:
    """Return the cost of an operator with these tensors, of which only shapes, strides and dtypes are read.

    Args:
        operator: `token_logprobs`, `token_logprob_partials`, `mix_logits`, `mix_sample`, `cross_entropy_`,
            `logit_partials`, `logit_gradient_`, `add_norm`, `add_norm_backward`, `split_rotated`, `join_rotated` or
            `bias_gelu_backward`.
        tensors: the operator's tensors in the order of its arguments, for example on `meta`: (hidden, heads, targets),
            (hidden, head, targets), (logits, log_weights), (logits, log_weights, log_likelihood) or (logits, targets).
            A layer's operators take the arguments of their schema, with None for tensors that do not exist.
        vocab_start: as for the operator.
        vocab_size: as for the operator.
        config: the block shape. Default: the best one for the GPU.
        on: the GPU. Default: the tensors' device.

    Raises:
        ValueError: the operator is unknown.
    """
    inputs: Any = tensors
    if operator == "token_logprobs":
        hidden, heads, targets = inputs
        return _score_cost(hidden, heads, targets, 0, vocab_size, config, on, finished=True)
    if operator == "token_logprob_partials":
        hidden, head, targets = inputs
        return _score_cost(hidden.unsqueeze(0), [head], targets, vocab_start, vocab_size, config, on)
    if operator in ("mix_logits", "mix_sample"):
        logits, log_weights, *rest = inputs
        return _mix_cost(operator, logits, log_weights, rest[0] if rest else None, config, on)
    if operator in ("cross_entropy_", "logit_partials", "logit_gradient_"):
        return _loss_cost(operator, inputs[0], vocab_size, config, on)
    if operator in LAYER_COSTS:
        return Cost(*LAYER_COSTS[operator](on, *inputs))
    raise ValueError(
        f"There is no operator {operator}. Use token_logprobs, token_logprob_partials, mix_logits, mix_sample, "
        "cross_entropy_, logit_partials, logit_gradient_, add_norm, add_norm_backward, split_rotated, join_rotated or "
        "bias_gelu_backward."
    )


def _score_cost(
    hidden: Tensor,
    heads: Sequence[Tensor],
    targets: Tensor,
    vocab_start: int,
    vocab_size: int | None,
    config: Any,
    on: Hardware | None,
    *,
    finished: bool = False,
) -> Cost:
    experts, tokens, inner = hidden.shape
    columns = real_columns(heads[0].shape[0], vocab_start, vocab_size)
    gpu = on or hardware(hidden.device)
    if config is None:
        bits = 8 * hidden.element_size() if heads[0].dtype == hidden.dtype else 32
        aligned = hidden.is_meta or row_alignment(hidden, heads) == 16
        config = score_configs(gpu, bits, tokens, inner, aligned=aligned)[0]
    splits = max(1, ceil_div(columns, split_columns(tokens, columns, config, gpu.multiprocessors)))
    # Partial results, or with the full vocabulary the log-probabilities.
    written = _FLOAT if finished else _PARTIALS
    total = Cost(0, 0, 0)
    for some_experts, some_tokens in score_pieces(experts, tokens, splits, config):
        count, length = some_experts.stop - some_experts.start, some_tokens.stop - some_tokens.start
        rows = count * length
        states = rows * inner * hidden.element_size()
        weights = count * columns * inner * heads[0].element_size()
        addresses = count * 2 * _INT
        parts = splits * rows * _PARTIALS
        total += Cost(1, states + weights + addresses + length * targets.element_size(), parts)
        total += Cost(1, parts, rows * written)
    return total


def _mix_cost(
    operator: str,
    logits: Tensor,
    log_weights: Tensor,
    log_likelihood: Tensor | None,
    config: Any,
    on: Hardware | None,
) -> Cost:
    experts, batch, vocabulary = logits.shape
    config = config or mix_configs(on or hardware(logits.device))[0]
    splits, blocks = ceil_div(vocabulary, config.split), ceil_div(vocabulary, config.block)
    element, weight = logits.element_size(), max(_FLOAT, log_weights.element_size())
    everything, weights = experts * batch * vocabulary * element, experts * batch * weight
    normalizers = experts * batch * splits * _NORMALIZER
    if operator == "mix_logits":
        second = Cost(1, everything + weights + normalizers, batch * vocabulary * _FLOAT)
        return Cost(1, everything + weights, normalizers) + second
    running = 0 if log_likelihood is None else experts * batch * log_likelihood.element_size()
    sampled = 0 if log_likelihood is None else experts * batch * element
    candidates, finished = batch * blocks * _PARTIALS, batch * _FLOAT
    # The program that finishes a row reads the candidates of all of its blocks, and each expert's logit of the token.
    picked = candidates + finished + running + sampled
    results = batch * (_INT + _FLOAT) + running
    second = Cost(1, everything + weights + normalizers + _INT + picked, candidates + finished + results)
    return Cost(1, everything + weights, normalizers + finished) + second


def _loss_cost(operator: str, logits: Tensor, vocab_size: int | None, config: Any, on: Hardware | None) -> Cost:
    """Return the cost of one launch. A row that does not stay in registers is read again from memory."""
    tokens = len(logits)
    size = logits.numel() * logits.element_size()
    if operator == "cross_entropy_":
        columns = real_columns(logits.shape[1], 0, vocab_size)
        config = config or cross_entropy_configs(on or hardware(logits.device), logits, columns)[0]
        passes = 1 if config.kept else 2
        return Cost(1, passes * size + tokens * _INT, size + tokens * _FLOAT)
    if operator == "logit_partials":
        return Cost(1, size + tokens * _INT, tokens * _PARTIALS)
    return Cost(1, size + tokens * (_INT + 2 * _FLOAT), size)
