"""Cross entropy over logits that become their gradient in place: public functions, and their PyTorch operators."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from btm_scale.kernels import loss_reference as reference
from btm_scale.kernels import operators, paths
from btm_scale.kernels.checks import check_logits
from btm_scale.kernels.hardware import Hardware
from btm_scale.kernels.loss_tuning import LossConfig, cross_entropy_configs, loss_configs
from btm_scale.kernels.partials import Partials
from btm_scale.kernels.paths import Result
from btm_scale.kernels.pieces import real_columns


@torch.no_grad()
def cross_entropy_(logits: Tensor, targets: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """Return the cross entropy in nats of each target, and replace the logits by its gradient.

    loss[t] = log sum_v exp(l[t, v]) - l[t, target_t], and l[t, v] becomes softmax(l[t])_v - [v = target_t].

    Args:
        logits: [tokens, rows], bfloat16, float16 or float32, with last stride 1. Changed in place.
        targets: int64 [tokens], each in [0, vocab_size); not checked.
        vocab_size: number of real columns; later ones are padding, whose gradient is 0. Default: all.

    Returns:
        float32 [tokens]; NaN if a logit of the row is NaN or +inf.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not match.
    """
    check_logits(logits, targets, vocab_size)
    losses: Tensor = CROSS_ENTROPY(logits, targets, vocab_size)
    return losses


@torch.no_grad()
def logit_partials(logits: Tensor, targets: Tensor, *, vocab_start: int = 0, vocab_size: int | None = None) -> Partials:
    """Return one vocabulary shard's partial results for the targets' log-probabilities.

    Args:
        logits: [tokens, rows] of the tokens from `vocab_start` on, with last stride 1.
        targets: int64 [tokens], indices into the full vocabulary.
        vocab_start: vocabulary index of the first column.
        vocab_size: number of real columns of the full vocabulary; later ones are padding. Default: all.

    Returns:
        float32 [tokens] each: the maximum logit (-inf for a shard of padding), the sum of exp(logit - maximum), and
        the target's logit (-inf if another shard has it), as of `token_logprob_partials`.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not match.
    """
    check_logits(logits, targets, vocab_size, vocab_start)
    partials: Partials = LOGIT_PARTIALS(logits, targets, vocab_start, vocab_size)
    return partials


@torch.no_grad()
def logit_gradient_(
    logits: Tensor,
    targets: Tensor,
    maximum: Tensor,
    sum_exp: Tensor,
    *,
    vocab_start: int = 0,
    vocab_size: int | None = None,
) -> None:
    """Replace one vocabulary shard's logits by the gradient of the cross entropy, softmax(l)_v - [v = target].

    Args:
        logits: as for `logit_partials`. Changed in place.
        targets: as for `logit_partials`.
        maximum: float32 [tokens], the maximum logit over all shards.
        sum_exp: float32 [tokens], the sum of exp(logit - maximum) over all shards.
        vocab_start: as for `logit_partials`.
        vocab_size: as for `logit_partials`.

    Raises:
        ValueError: shapes, dtypes, strides or devices do not match.
    """
    check_logits(logits, targets, vocab_size, vocab_start, maximum, sum_exp)
    LOGIT_GRADIENT(logits, targets, maximum, sum_exp, vocab_start, vocab_size)


def _run_cross_entropy(logits: Tensor, targets: Tensor, vocab_size: int | None) -> Tensor:
    targets = targets.contiguous()
    columns = real_columns(logits.shape[1], 0, vocab_size)
    return _run(
        "cross_entropy_",
        logits,
        lambda module, config: module.cross_entropy_(logits, targets, vocab_size=vocab_size, config=config),
        lambda: reference.cross_entropy_(logits, targets, vocab_size=vocab_size),
        lambda gpu: cross_entropy_configs(gpu, logits, columns),
    )


def _run_logit_partials(logits: Tensor, targets: Tensor, vocab_start: int, vocab_size: int | None) -> Partials:
    columns: dict[str, Any] = {"vocab_start": vocab_start, "vocab_size": vocab_size}
    targets = targets.contiguous()
    return _run(
        "logit_partials",
        logits,
        lambda module, config: module.logit_partials(logits, targets, **columns, config=config),
        lambda: reference.logit_partials(logits, targets, **columns),
    )


def _run_logit_gradient(
    logits: Tensor, targets: Tensor, maximum: Tensor, sum_exp: Tensor, vocab_start: int, vocab_size: int | None
) -> None:
    columns: dict[str, Any] = {"vocab_start": vocab_start, "vocab_size": vocab_size}
    rows = targets.contiguous(), maximum.contiguous(), sum_exp.contiguous()
    _run(
        "logit_gradient_",
        logits,
        lambda module, config: module.logit_gradient_(logits, *rows, **columns, config=config),
        lambda: reference.logit_gradient_(logits, *rows, **columns),
    )


def _run(
    name: str,
    logits: Tensor,
    launch: Callable[[ModuleType, LossConfig], Result],
    plain: Callable[[], Result],
    configs: Callable[[Hardware], list[LossConfig]] = loss_configs,
) -> Result:
    """Return what a kernel returns, or what PyTorch computes where it cannot run."""
    module = _triton(logits)
    if module is None:
        return paths.run_reference(name, plain)
    return paths.run(name, logits, configs, lambda config: launch(module, config), plain)


def _triton(logits: Tensor) -> ModuleType | None:
    """Return the module that launches these kernels, or None without tokens or where `triton_module` returns None."""
    if len(logits) == 0 or operators.triton_module(logits) is None:
        return None
    return importlib.import_module("btm_scale.kernels.loss_launch")


def _fake_losses(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(logits.shape[:1], dtype=torch.float32)


def _fake_partials(logits: Tensor, *_: object) -> Partials:
    return _fake_losses(logits), _fake_losses(logits), _fake_losses(logits)


def _fake_nothing(*_: object) -> None:
    return None


CROSS_ENTROPY = operators.define(
    "cross_entropy_",
    "(Tensor(a!) logits, Tensor targets, SymInt? vocab_size) -> Tensor",
    _run_cross_entropy,
    _fake_losses,
)
LOGIT_PARTIALS = operators.define(
    "logit_partials",
    "(Tensor logits, Tensor targets, SymInt vocab_start, SymInt? vocab_size) -> (Tensor, Tensor, Tensor)",
    _run_logit_partials,
    _fake_partials,
)
LOGIT_GRADIENT = operators.define(
    "logit_gradient_",
    "(Tensor(a!) logits, Tensor targets, Tensor maximum, Tensor sum_exp, SymInt vocab_start, SymInt? vocab_size) -> ()",
    _run_logit_gradient,
    _fake_nothing,
)
# By name, for tests whose GPUs PyTorch's dispatcher does not know.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "cross_entropy_": _run_cross_entropy,
    "logit_partials": _run_logit_partials,
    "logit_gradient_": _run_logit_gradient,
}
