"""Launch the Triton kernels with a block shape, on the current device and its current stream."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from btm_scale.kernels.drawing import draw_kernel
from btm_scale.kernels.hardware import hardware
from btm_scale.kernels.mixing import mix_kernel, normalizer_kernel
from btm_scale.kernels.partials import Partials
from btm_scale.kernels.pieces import (
    COMBINE_BLOCK,
    COMBINE_SPLITS,
    ceil_div,
    real_columns,
    row_alignment,
    score_pieces,
    split_columns,
)
from btm_scale.kernels.scoring import combine_kernel, score_kernel
from btm_scale.kernels.tuning_table import MixConfig, ScoreConfig

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def score_partials(
    hidden: Tensor, heads: Sequence[Tensor], targets: Tensor, *, config: ScoreConfig, **settings: Any
) -> Partials:
    """Return (maximum, sum_exp, target_logit), each [experts, tokens]; the keyword arguments are those of `score`."""
    out = torch.empty(3, *hidden.shape[:2], device=hidden.device)
    score(out, hidden, heads, targets, config=config, **settings)
    return out[0], out[1], out[2]


def token_logprobs(
    hidden: Tensor, heads: Sequence[Tensor], targets: Tensor, *, config: ScoreConfig, **settings: Any
) -> Tensor:
    """Return the targets' log-probabilities [experts, tokens]; the keyword arguments are those of `score`."""
    out = torch.empty(1, *hidden.shape[:2], device=hidden.device)
    score(out, hidden, heads, targets, config=config, **settings)
    return out[0]


def score(
    out: Tensor,
    hidden: Tensor,
    heads: Sequence[Tensor],
    targets: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    config: ScoreConfig,
) -> None:
    """Fill `out`, [3, experts, tokens] with partials or [1, experts, tokens] with log-probabilities, in two launches.

    More launches where more extra memory would be needed. The last stride of `hidden` and of every head must be 1,
    and at least one expert and one token must be given.
    """
    experts, tokens, inner = hidden.shape
    columns = real_columns(heads[0].shape[0], vocab_start, vocab_size)
    # The interpreter multiplies bfloat16 incorrectly, without an error, so it always uses float32.
    widened = heads[0].dtype != hidden.dtype or not hidden.is_cuda
    split = split_columns(tokens, columns, config, hardware(hidden.device).multiprocessors)
    splits = max(1, ceil_div(columns, split))
    table = _addresses(hidden.device, tuple((head.data_ptr(), head.stride(0)) for head in heads))
    targets = targets.contiguous()

    for some_experts, some_tokens in score_pieces(experts, tokens, splits, config):
        piece = hidden[some_experts, some_tokens]
        count, length = piece.shape[:2]
        parts = torch.empty(3, splits, count, length, device=hidden.device)
        score_kernel[(count * splits * ceil_div(length, config.block_t),)](
            piece,
            table[some_experts],
            targets[some_tokens],
            parts,
            count,
            length,
            columns,
            inner,
            splits,
            split,
            vocab_start,
            ignore_index,
            1.0 if soft_cap is None else float(soft_cap),
            piece.stride(0),
            piece.stride(1),
            HEAD_DTYPE=_TYPES[heads[0].dtype],
            DOT_DTYPE=tl.float32 if widened else _TYPES[hidden.dtype],
            SOFT_CAP=soft_cap is not None,
            EVEN_K=inner % config.block_k == 0,
            ALIGN=row_alignment(hidden, heads),
            GROUP=config.group,
            BLOCK_T=config.block_t,
            BLOCK_V=config.block_v,
            BLOCK_K=config.block_k,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        rows = count * length
        combine_kernel[(ceil_div(rows, COMBINE_BLOCK),)](
            parts,
            out[:, some_experts, some_tokens],
            length,
            rows,
            splits,
            out.stride(1),
            out.stride(0),
            FINISH=len(out) == 1,
            BLOCK=COMBINE_BLOCK,
            SPLITS=COMBINE_SPLITS,
        )


@functools.cache
def _addresses(device: torch.device, heads: tuple[tuple[int, int], ...]) -> Tensor:
    """Return the addresses and row strides of heads on the device, int64 [experts, 2].

    Copying them synchronizes, so they are kept: later calls with heads in the same places can be captured in a graph.
    They are kept for good, at 16 bytes per head, since a graph has only the table's address, and a kernel on another
    stream may still read it.
    """
    return torch.tensor(heads, device=device)


def mix_logits(logits: Tensor, log_weights: Tensor, *, config: MixConfig) -> Tensor:
    """See `btm_scale.kernels.mix_logits`. The last strides of both tensors must be 1."""
    experts, batch, vocabulary = logits.shape
    normalizers, constants = _normalize(logits, log_weights, None, config)
    mixture = torch.empty(batch, vocabulary, device=logits.device)
    mix_kernel[(batch * ceil_div(vocabulary, config.block),)](
        logits,
        log_weights,
        normalizers,
        mixture,
        experts,
        batch,
        vocabulary,
        logits.stride(0),
        logits.stride(1),
        log_weights.stride(0),
        **constants,
    )
    return mixture


def mix_sample(
    logits: Tensor,
    log_weights: Tensor,
    temperature: float,
    generator: torch.Generator | None,
    log_likelihood: Tensor | None,
    *,
    config: MixConfig,
) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.mix_sample`. The last stride of every tensor must be 1."""
    experts, batch, vocabulary = logits.shape
    device = logits.device
    blocks = ceil_div(vocabulary, config.block)
    # The seed stays on the device: reading it back would synchronize every decoding step.
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=device)
    candidates = torch.empty(2, batch, blocks, device=device)
    block_tokens = torch.empty(batch, blocks + 1, dtype=torch.int32, device=device)
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    log_probs = torch.empty(batch, device=device)
    normalizers, constants = _normalize(logits, log_weights, block_tokens, config)
    running = log_probs if log_likelihood is None else log_likelihood
    draw_kernel[(batch * blocks,)](
        logits,
        log_weights,
        normalizers,
        seed,
        candidates,
        block_tokens,
        tokens,
        log_probs,
        running,
        float(temperature) or 1.0,
        experts,
        batch,
        vocabulary,
        logits.stride(0),
        logits.stride(1),
        log_weights.stride(0),
        running.stride(0),
        GREEDY=temperature == 0,
        UPDATE=log_likelihood is not None,
        BLOCKS=triton.next_power_of_2(blocks),
        **constants,
    )
    return tokens, log_probs


def _normalize(
    logits: Tensor, log_weights: Tensor, block_tokens: Tensor | None, config: MixConfig
) -> tuple[Tensor, dict[str, Any]]:
    """Launch the first pass; return the normalizers [2, batch, experts, splits] and the second pass's constants."""
    experts, batch, vocabulary = logits.shape
    splits = ceil_div(vocabulary, config.split)
    normalizers = torch.empty(2, batch, experts, splits, device=logits.device)
    constants = {"SPLIT": config.split, "BLOCK": config.block, "num_warps": config.warps}
    normalizer_kernel[(batch * experts * splits,)](
        logits,
        log_weights,
        normalizers,
        block_tokens,
        experts,
        batch,
        vocabulary,
        ceil_div(vocabulary, config.block),
        logits.stride(0),
        logits.stride(1),
        log_weights.stride(0),
        DRAW=block_tokens is not None,
        **constants,
    )
    constants["EXPERTS"] = triton.next_power_of_2(experts)
    constants["SPLITS"] = triton.next_power_of_2(splits)
    return normalizers, constants
