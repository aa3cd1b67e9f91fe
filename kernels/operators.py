"""The kernels as PyTorch operators: `torch.ops.btm_scale.token_logprobs` and three others.

Each runs on any device and has a fake implementation, so FakeTensorMode, `meta` tensors, torch.compile and profilers
see it. They are defined by schema and not by `torch.library.custom_op`, whose wrappers take as long as three launches.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from btm_scale.kernels import paths, reference
from btm_scale.kernels.hardware import Hardware, interpreter_problem, is_interpreted
from btm_scale.kernels.partials import Partials
from btm_scale.kernels.pieces import row_alignment
from btm_scale.kernels.tuning import mix_configs, score_configs
from btm_scale.kernels.tuning_table import MixConfig, ScoreConfig

NAMESPACE = "btm_scale"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def token_logprobs(
    hidden: Tensor,
    heads: Sequence[Tensor],
    targets: Tensor,
    vocab_size: int | None,
    ignore_index: int,
    soft_cap: float | None,
) -> Tensor:
    """See `btm_scale.kernels.token_logprobs`, except that NaN is returned instead of raised."""
    if hidden.shape[1] == 0:
        return hidden.new_empty(hidden.shape[:2], dtype=torch.float32)
    settings: dict[str, Any] = {"vocab_size": vocab_size, "ignore_index": ignore_index, "soft_cap": soft_cap}
    return _score(
        "token_logprobs",
        hidden,
        heads,
        lambda launch, rows, weights, config: launch.token_logprobs(rows, weights, targets, config=config, **settings),
        lambda: reference.token_logprobs(hidden, heads, targets, **settings),
    )


def token_logprob_partials(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    vocab_start: int,
    vocab_size: int | None,
    ignore_index: int,
    soft_cap: float | None,
) -> Partials:
    """See `btm_scale.kernels.token_logprob_partials`."""
    if hidden.shape[0] == 0:
        return _fake_partials(hidden)
    settings: dict[str, Any] = {
        "vocab_start": vocab_start,
        "vocab_size": vocab_size,
        "ignore_index": ignore_index,
        "soft_cap": soft_cap,
    }

    def launch(module: ModuleType, rows: Tensor, heads: list[Tensor], config: ScoreConfig) -> Partials:
        maximum, sum_exp, target = module.score_partials(rows, heads, targets, config=config, **settings)
        return maximum[0], sum_exp[0], target[0]

    return _score(
        "token_logprob_partials",
        hidden.unsqueeze(0),
        [head],
        launch,
        lambda: reference.token_logprob_partials(hidden, head, targets, **settings),
    )


def mix_logits(logits: Tensor, log_weights: Tensor) -> Tensor:
    """See `btm_scale.kernels.mix_logits`."""

    def plain() -> Tensor:
        return reference.mix_logits(logits, log_weights)

    module = triton_module(logits)
    if module is None or logits.shape[1] == 0:
        return paths.run_reference("mix_logits", plain)
    rows, weights = _unit_stride(logits), _weights(log_weights)
    return paths.run(
        "mix_logits", logits, mix_configs, lambda config: module.mix_logits(rows, weights, config=config), plain
    )


def mix_sample(
    logits: Tensor,
    log_weights: Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
    log_likelihood: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `btm_scale.kernels.mix_sample`."""

    def plain() -> tuple[Tensor, Tensor]:
        return reference.mix_sample(
            logits, log_weights, temperature=temperature, generator=generator, log_likelihood=log_likelihood
        )

    module = triton_module(logits)
    if module is None or logits.shape[1] == 0:
        return paths.run_reference("mix_sample", plain)
    rows, weights = _unit_stride(logits), _weights(log_weights)
    running = None if log_likelihood is None else _unit_stride(log_likelihood)

    def launch(config: MixConfig) -> tuple[Tensor, Tensor]:
        sampled: tuple[Tensor, Tensor] = module.mix_sample(
            rows, weights, temperature, generator, running, config=config
        )
        if log_likelihood is not None and running is not None and running is not log_likelihood:
            log_likelihood.copy_(running)
        return sampled

    return paths.run("mix_sample", logits, mix_configs, launch, plain)


def _score(
    operator: str,
    hidden: Tensor,
    heads: Sequence[Tensor],
    launch: Callable[[ModuleType, Tensor, list[Tensor], ScoreConfig], Any],
    plain: Callable[[], Any],
) -> Any:
    module = triton_module(hidden)
    if module is None or hidden.shape[2] == 0:
        return paths.run_reference(operator, plain)
    hidden, heads = _unit_stride(hidden), [_unit_stride(head) for head in heads]
    _, tokens, inner = hidden.shape
    bits = 8 * hidden.element_size() if heads[0].dtype == hidden.dtype else 32
    aligned = row_alignment(hidden, heads) == 16

    def configs(hardware: Hardware) -> list[ScoreConfig]:
        return score_configs(hardware, bits, tokens, inner, aligned=aligned)

    return paths.run(operator, hidden, configs, lambda config: launch(module, hidden, heads, config), plain)


def triton_module(tensor: Tensor) -> ModuleType | None:
    """Return the module that launches the kernels, or None if the tensor's device or a missing Triton rules it out."""
    if not (tensor.is_cuda or is_interpreted()):
        return None
    if is_interpreted() and (problem := interpreter_problem()):
        raise RuntimeError(problem)
    try:
        return importlib.import_module("btm_scale.kernels.triton_launch")
    except ImportError as error:
        paths.stop_using_triton(error)
        return None


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _weights(log_weights: Tensor) -> Tensor:
    if log_weights.dtype not in (torch.float32, torch.float64):
        log_weights = log_weights.float()
    return _unit_stride(log_weights)


def _fake_logprobs(hidden: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(hidden.shape[:2], dtype=torch.float32)


def _fake_partials(hidden: Tensor, *_: object) -> Partials:
    maximum, sum_exp, target_logit = (hidden.new_empty(hidden.shape[:1], dtype=torch.float32) for _ in range(3))
    return maximum, sum_exp, target_logit


def _fake_mixture(logits: Tensor, log_weights: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[1:], dtype=torch.float32)


def _fake_sample(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    batch = logits.shape[1:2]
    return logits.new_empty(batch, dtype=torch.int64), logits.new_empty(batch, dtype=torch.float32)


def define(name: str, schema: str, kernel: Callable[..., Any], fake: Callable[..., Any], *tags: torch.Tag) -> Any:
    """Define `torch.ops.btm_scale.NAME` by its schema, what computes it, and its fake implementation."""
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    _LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


TOKEN_LOGPROBS = define(
    "token_logprobs",
    "(Tensor hidden, Tensor[] heads, Tensor targets, SymInt? vocab_size, SymInt ignore_index, float? soft_cap)"
    " -> Tensor",
    token_logprobs,
    _fake_logprobs,
)
TOKEN_LOGPROB_PARTIALS = define(
    "token_logprob_partials",
    "(Tensor hidden, Tensor head, Tensor targets, SymInt vocab_start, SymInt? vocab_size, SymInt ignore_index,"
    " float? soft_cap) -> (Tensor, Tensor, Tensor)",
    token_logprob_partials,
    _fake_partials,
)
MIX_LOGITS = define("mix_logits", "(Tensor logits, Tensor log_weights) -> Tensor", mix_logits, _fake_mixture)
MIX_SAMPLE = define(
    "mix_sample",
    "(Tensor logits, Tensor log_weights, float temperature, Generator? generator=None,"
    " Tensor(a!)? log_likelihood=None) -> (Tensor, Tensor)",
    mix_sample,
    _fake_sample,
    torch.Tag.nondeterministic_seeded,
)
