"""Launch the Triton kernels, with the signatures of `reference`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from btm_scale.kernels import tuning
from btm_scale.kernels.mixing import draw_kernel, mix_kernel, normalizer_kernel, pick_kernel
from btm_scale.kernels.partials import Partials, finish
from btm_scale.kernels.scoring import combine_kernel, score_kernel
from btm_scale.kernels.tuning import MixConfig, ScoreConfig

PARTIAL_BYTES = 16 << 20  # memory for partials per launch; more experts or tokens take more launches
_COMBINE_BLOCK = 1024
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def token_logprobs(
    hidden: Tensor,
    heads: Sequence[Tensor],
    targets: Tensor,
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    config: ScoreConfig | None = None,
) -> Tensor:
    """See `btm_scale.kernels.token_logprobs`, except that NaN is returned instead of raised."""
    return finish(*_partials(hidden, heads, targets, 0, vocab_size, ignore_index, soft_cap, config))


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
    parts = _partials(hidden.unsqueeze(0), [head], targets, vocab_start, vocab_size, ignore_index, soft_cap, None)
    return parts[0][0], parts[1][0], parts[2][0]


def mix_logits(logits: Tensor, log_weights: Tensor, *, config: MixConfig | None = None) -> Tensor:
    """See `btm_scale.kernels.mix_logits`."""
    _, batch, vocabulary = logits.shape
    mixture = torch.empty(batch, vocabulary, device=logits.device)
    mixing = _Mixing(logits, log_weights, config)
    for rows in mixing.chunks():
        pieces, arguments, constants = mixing.normalize(rows)
        grid = (pieces * arguments["batch"],)
        mix_kernel[grid](mixture_ptr=mixture[rows], vocabulary=vocabulary, **arguments, **constants)
    return mixture


def mix_sample(
    logits: Tensor,
    log_weights: Tensor,
    *,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    log_likelihood: Tensor | None = None,
    config: MixConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.mix_sample`."""
    _, batch, vocabulary = logits.shape
    device = logits.device
    # The seed stays on the device: reading it back would synchronize every decoding step.
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=device)
    tokens = torch.empty(batch, dtype=torch.int64, device=device)
    log_probs = torch.empty(batch, device=device)
    mixing = _Mixing(logits, log_weights, config)
    for rows in mixing.chunks():
        blocks, arguments, constants = mixing.normalize(rows)
        count = arguments["batch"]
        score = torch.empty(count, blocks, device=device)
        token = torch.empty(count, blocks, dtype=torch.int32, device=device)
        log_prob = torch.empty_like(score)
        block_results = {"score_ptr": score, "token_ptr": token, "log_prob_ptr": log_prob}
        draw_kernel[(blocks * count,)](
            seed_ptr=seed,
            first_row=rows.start,
            temperature=float(temperature) or 1.0,
            vocabulary=vocabulary,
            GREEDY=temperature == 0,
            **block_results,
            **arguments,
            **constants,
        )
        running = log_probs if log_likelihood is None else log_likelihood[rows]
        del constants["BLOCK"]
        pick_kernel[(count,)](
            out_token_ptr=tokens[rows],
            out_log_prob_ptr=log_probs[rows],
            log_likelihood_ptr=running,
            blocks=blocks,
            likelihood_stride=running.stride(0),
            UPDATE=log_likelihood is not None,
            BLOCKS=triton.next_power_of_2(blocks),
            **block_results,
            **arguments,
            **constants,
        )
    return tokens, log_probs


class _Mixing:
    """Splits a mixture's rows into chunks that stay in the cache between the passes, and prepares the arguments."""

    def __init__(self, logits: Tensor, log_weights: Tensor, config: MixConfig | None) -> None:
        self.logits = logits if logits.stride(2) == 1 else logits.contiguous()
        if log_weights.dtype not in (torch.float32, torch.float64):
            log_weights = log_weights.float()
        self.log_weights = log_weights if log_weights.stride(1) == 1 else log_weights.contiguous()
        self.config = config or tuning.mix_config(tuning.architecture(logits.device))

    def chunks(self) -> list[slice]:
        experts, batch, vocabulary = self.logits.shape
        row_bytes = max(1, experts * vocabulary * self.logits.element_size())
        rows = max(1, self.config.cache_bytes // row_bytes)
        return [slice(start, min(start + rows, batch)) for start in range(0, batch, rows)]

    def normalize(self, rows: slice) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Launch the first pass; return the number of vocabulary blocks and the next kernels' arguments."""
        logits, log_weights = self.logits[:, rows], self.log_weights[rows]
        experts, batch, vocabulary = logits.shape
        splits = triton.cdiv(vocabulary, self.config.split)
        arguments = {
            "logits_ptr": logits,
            "log_weights_ptr": log_weights,
            "maximum_ptr": torch.empty(experts, batch, splits, device=logits.device),
            "sum_exp_ptr": torch.empty(experts, batch, splits, device=logits.device),
            "batch": batch,
            "splits": splits,
            "expert_stride": logits.stride(0),
            "row_stride": logits.stride(1),
            "weight_stride": log_weights.stride(0),
        }
        constants = {"BLOCK": self.config.block, "num_warps": self.config.warps}
        normalizer_kernel[(experts * batch * splits,)](
            vocabulary=vocabulary, SPLIT=self.config.split, **arguments, **constants
        )
        arguments["experts"] = experts
        constants["EXPERTS"] = triton.next_power_of_2(experts)
        constants["SPLITS"] = triton.next_power_of_2(splits)
        return triton.cdiv(vocabulary, self.config.block), arguments, constants


def _partials(
    hidden: Tensor,
    heads: Sequence[Tensor],
    targets: Tensor,
    vocab_start: int,
    vocab_size: int | None,
    ignore_index: int,
    soft_cap: float | None,
    config: ScoreConfig | None,
) -> Partials:
    """Return (maximum, sum_exp, target_logit), each [experts, tokens], in launches of bounded extra memory."""
    experts, tokens, inner = hidden.shape
    columns = heads[0].shape[0]
    if vocab_size is not None:
        columns = max(0, min(columns, vocab_size - vocab_start))
    hidden = hidden if hidden.stride(2) == 1 else hidden.contiguous()
    heads = [head if head.stride(1) == 1 else head.contiguous() for head in heads]
    same_dtype = all(head.dtype == hidden.dtype for head in heads)
    # The interpreter multiplies bfloat16 incorrectly, without an error, so it always uses float32.
    widened = not same_dtype or not hidden.is_cuda
    align = min(_alignment(tensor) for tensor in [hidden, *heads])
    if config is None:
        bits = 32 if not same_dtype else 8 * hidden.element_size()
        arch = tuning.architecture(hidden.device)
        config = tuning.score_config(arch, bits, tokens, inner, aligned=align == 16)
    splits = max(1, triton.cdiv(columns, config.split))
    table = torch.tensor([[head.data_ptr(), head.stride(0)] for head in heads], device=hidden.device)
    out = tuple(torch.empty(experts, tokens, device=hidden.device) for _ in range(3))

    token_step = min(tokens, max(config.block_t, PARTIAL_BYTES // (12 * splits)))
    expert_step = max(1, PARTIAL_BYTES // (12 * splits * max(1, token_step)))
    for first in range(0, experts, expert_step):
        for start in range(0, tokens, token_step):
            some_experts = slice(first, min(first + expert_step, experts))
            piece = hidden[some_experts, start : start + token_step]
            count, length = piece.shape[:2]
            parts = [torch.empty(splits, count, length, device=hidden.device) for _ in range(3)]
            score_kernel[(count * splits * triton.cdiv(length, config.block_t),)](
                piece,
                table[some_experts],
                targets[start : start + token_step].contiguous(),
                *parts,
                count,
                length,
                columns,
                inner,
                splits,
                vocab_start,
                ignore_index,
                1.0 if soft_cap is None else float(soft_cap),
                piece.stride(0),
                piece.stride(1),
                HEAD_DTYPE=_TYPES[heads[0].dtype],
                DOT_DTYPE=tl.float32 if widened else _TYPES[hidden.dtype],
                SOFT_CAP=soft_cap is not None,
                EVEN_K=inner % config.block_k == 0,
                ALIGN=align,
                SPLIT=config.split,
                GROUP=config.group,
                BLOCK_T=config.block_t,
                BLOCK_V=config.block_v,
                BLOCK_K=config.block_k,
                num_warps=config.warps,
                num_stages=config.stages,
            )
            folded = [torch.empty(count, length, device=hidden.device) for _ in range(3)]
            combine_kernel[(triton.cdiv(count * length, _COMBINE_BLOCK),)](
                *parts, *folded, count * length, splits, BLOCK=_COMBINE_BLOCK
            )
            for total, part in zip(out, folded, strict=True):
                total[some_experts, start : start + token_step] = part
    return out[0], out[1], out[2]


def _alignment(tensor: Tensor) -> int:
    """Return 16 if every row starts at a multiple of 16 bytes, otherwise the size of an element."""
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()[:-1]]
    return 16 if all(value % 16 == 0 for value in (tensor.data_ptr(), *strides)) else size
