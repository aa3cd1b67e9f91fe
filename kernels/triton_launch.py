"""Launch the Triton kernels with a block shape, on the current device and its current stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from btm_scale.kernels.mixing import draw_kernel, mix_kernel, normalizer_kernel, pick_kernel
from btm_scale.kernels.partials import Partials
from btm_scale.kernels.pieces import (
    COMBINE_BLOCK,
    ceil_div,
    mix_pieces,
    real_columns,
    row_alignment,
    score_pieces,
    score_splits,
)
from btm_scale.kernels.scoring import combine_kernel, score_kernel
from btm_scale.kernels.tuning_table import MixConfig, ScoreConfig

_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def score_partials(
    hidden: Tensor,
    heads: Sequence[Tensor],
    targets: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    soft_cap: float | None = None,
    config: ScoreConfig,
) -> Partials:
    """Return (maximum, sum_exp, target_logit), each [experts, tokens], in launches of bounded extra memory.

    The last stride of `hidden` and of every head must be 1, and at least one expert and one token must be given.
    """
    experts, tokens, inner = hidden.shape
    columns = real_columns(heads[0].shape[0], vocab_start, vocab_size)
    # The interpreter multiplies bfloat16 incorrectly, without an error, so it always uses float32.
    widened = heads[0].dtype != hidden.dtype or not hidden.is_cuda
    splits = score_splits(columns, config)
    table = torch.tensor([[head.data_ptr(), head.stride(0)] for head in heads], device=hidden.device)
    out = tuple(torch.empty(experts, tokens, device=hidden.device) for _ in range(3))

    for some_experts, some_tokens in score_pieces(experts, tokens, splits, config):
        piece = hidden[some_experts, some_tokens]
        count, length = piece.shape[:2]
        parts = [torch.empty(splits, count, length, device=hidden.device) for _ in range(3)]
        score_kernel[(count * splits * ceil_div(length, config.block_t),)](
            piece,
            table[some_experts],
            targets[some_tokens].contiguous(),
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
            ALIGN=row_alignment(hidden, heads),
            SPLIT=config.split,
            GROUP=config.group,
            BLOCK_T=config.block_t,
            BLOCK_V=config.block_v,
            BLOCK_K=config.block_k,
            num_warps=config.warps,
            num_stages=config.stages,
        )
        folded = [torch.empty(count, length, device=hidden.device) for _ in range(3)]
        combine_kernel[(ceil_div(count * length, COMBINE_BLOCK),)](
            *parts, *folded, count * length, splits, BLOCK=COMBINE_BLOCK
        )
        for total, part in zip(out, folded, strict=True):
            total[some_experts, some_tokens] = part
    return out[0], out[1], out[2]


def mix_logits(logits: Tensor, log_weights: Tensor, *, config: MixConfig) -> Tensor:
    """See `btm_scale.kernels.mix_logits`. The last strides of both tensors must be 1."""
    _, batch, vocabulary = logits.shape
    mixture = torch.empty(batch, vocabulary, device=logits.device)
    mixing = _Mixing(logits, log_weights, config)
    for rows in mixing.pieces(0):
        blocks, arguments, constants = mixing.normalize(rows)
        grid = (blocks * arguments["batch"],)
        mix_kernel[grid](mixture_ptr=mixture[rows], vocabulary=vocabulary, **arguments, **constants)
    return mixture


class Draw:
    """One call of `btm_scale.kernels.mix_sample`, which continues after its finished rows if a shape is refused.

    `log_likelihood` is updated with each row's token, so no row may run twice.
    """

    def __init__(
        self,
        logits: Tensor,
        log_weights: Tensor,
        temperature: float,
        generator: torch.Generator | None,
        log_likelihood: Tensor | None,
    ) -> None:
        batch, device = logits.shape[1], logits.device
        self._logits, self._log_weights, self._log_likelihood = logits, log_weights, log_likelihood
        self._temperature = temperature
        # The seed stays on the device: reading it back would synchronize every decoding step.
        self._seed = torch.randint(2**63 - 1, (1,), generator=generator, device=device)
        self.tokens = torch.empty(batch, dtype=torch.int64, device=device)
        self.log_probs = torch.empty(batch, device=device)
        self.finished_rows = 0

    def run(self, config: MixConfig) -> None:
        """Draw the tokens of the rows that are not finished."""
        mixing = _Mixing(self._logits, self._log_weights, config)
        vocabulary = self._logits.shape[2]
        for rows in mixing.pieces(self.finished_rows):
            blocks, arguments, constants = mixing.normalize(rows)
            count, device = arguments["batch"], self._logits.device
            score = torch.empty(count, blocks, device=device)
            block_results = {
                "score_ptr": score,
                "token_ptr": torch.empty(count, blocks, dtype=torch.int32, device=device),
                "log_prob_ptr": torch.empty_like(score),
            }
            draw_kernel[(blocks * count,)](
                seed_ptr=self._seed,
                first_row=rows.start,
                temperature=float(self._temperature) or 1.0,
                vocabulary=vocabulary,
                GREEDY=self._temperature == 0,
                **block_results,
                **arguments,
                **constants,
            )
            running = self.log_probs if self._log_likelihood is None else self._log_likelihood[rows]
            del constants["BLOCK"]
            pick_kernel[(count,)](
                out_token_ptr=self.tokens[rows],
                out_log_prob_ptr=self.log_probs[rows],
                log_likelihood_ptr=running,
                blocks=blocks,
                likelihood_stride=running.stride(0),
                UPDATE=self._log_likelihood is not None,
                BLOCKS=triton.next_power_of_2(blocks),
                **block_results,
                **arguments,
                **constants,
            )
            self.finished_rows = rows.stop


class _Mixing:
    """Divides a mixture's rows into pieces that stay in the cache between the passes, and prepares the arguments."""

    def __init__(self, logits: Tensor, log_weights: Tensor, config: MixConfig) -> None:
        self.logits, self.log_weights, self.config = logits, log_weights, config

    def pieces(self, first_row: int) -> list[slice]:
        """Return the rows of each piece, from `first_row` on."""
        experts, batch, vocabulary = self.logits.shape
        pieces = mix_pieces(experts, batch - first_row, vocabulary, self.logits.element_size(), self.config)
        return [slice(rows.start + first_row, rows.stop + first_row) for rows in pieces]

    def normalize(self, rows: slice) -> tuple[int, dict[str, Any], dict[str, Any]]:
        """Launch the first pass; return the number of vocabulary blocks and the next kernels' arguments."""
        logits, log_weights = self.logits[:, rows], self.log_weights[rows]
        experts, batch, vocabulary = logits.shape
        splits = ceil_div(vocabulary, self.config.split)
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
        return ceil_div(vocabulary, self.config.block), arguments, constants
