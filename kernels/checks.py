"""Argument checks of the public functions. All raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def check_heads(hidden: Tensor, heads: Sequence[Tensor], targets: Tensor) -> None:
    """Check hidden states [experts, tokens, hidden] with one head per expert."""
    if hidden.ndim != 3 or len(heads) != hidden.shape[0]:
        raise ValueError(
            f"hidden is {list(hidden.shape)} with {len(heads)} heads. It must be [experts, tokens, hidden] with one "
            "head per expert."
        )
    if not heads:
        raise ValueError("hidden has no experts. At least one expert is needed to score: pass its states and its head.")
    for head in heads:
        check_projection(hidden[0], head, targets)
    if any(head.shape != heads[0].shape or head.dtype != heads[0].dtype for head in heads):
        raise ValueError("The heads differ in shape or dtype. Score such experts one at a time.")


def check_projection(hidden: Tensor, head: Tensor, targets: Tensor) -> None:
    """Check one expert's hidden states [tokens, hidden], head [vocab, hidden] and targets [tokens]."""
    if hidden.ndim != 2 or head.ndim != 2 or targets.ndim != 1:
        raise ValueError(
            "hidden, head and targets must be [tokens, hidden], [vocab, hidden] and [tokens] for each expert."
        )
    if hidden.shape[1] != head.shape[1] or hidden.shape[0] != targets.shape[0]:
        raise ValueError(
            f"hidden is {list(hidden.shape)}, head {list(head.shape)} and targets {list(targets.shape)}. Hidden sizes "
            "and numbers of tokens must agree."
        )
    if hidden.dtype not in _FLOATS or head.dtype not in _FLOATS:
        raise ValueError(f"hidden is {hidden.dtype} and head {head.dtype}. Use bfloat16, float16 or float32.")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}. They are indices into the vocabulary: pass torch.int64.")
    _check_devices(hidden=hidden, head=head, targets=targets)


def check_scoring(vocab_size: int | None, soft_cap: float | None, vocab_start: int = 0) -> None:
    """Check the settings of the scoring functions."""
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size is {vocab_size}. It must be at least 1, or None for all rows of the head.")
    if vocab_start < 0:
        raise ValueError(f"vocab_start is {vocab_start}. It is the vocabulary index of a row: use 0 or more.")
    if soft_cap is not None and not 0 < soft_cap < float("inf"):
        raise ValueError(f"soft_cap is {soft_cap}. It must be positive and finite, or None for logits without a bound.")


def check_logits(
    logits: Tensor, targets: Tensor, vocab_size: int | None, vocab_start: int = 0, *statistics: Tensor
) -> None:
    """Check logits [tokens, rows], targets [tokens], and the statistics `maximum` and `sum_exp` [tokens]."""
    if logits.ndim != 2 or any(tensor.shape != logits.shape[:1] for tensor in (targets, *statistics)):
        shapes = [list(tensor.shape) for tensor in (targets, *statistics)]
        raise ValueError(
            f"logits are {list(logits.shape)} and targets {shapes}. They must be [tokens, rows] and [tokens]."
        )
    if logits.dtype not in _FLOATS:
        raise ValueError(f"logits are {logits.dtype}. Use bfloat16, float16 or float32.")
    if other := next((tensor.dtype for tensor in statistics if tensor.dtype != torch.float32), None):
        raise ValueError(f"maximum or sum_exp is {other}. Pass both in torch.float32, as logit_partials returns them.")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}. They are indices into the vocabulary: pass torch.int64.")
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise ValueError(f"logits have strides {logits.stride()}. They are changed in place: the last must be 1.")
    check_scoring(vocab_size, None, vocab_start)
    _check_devices(logits=logits, targets=targets, **{f"statistic {i}": each for i, each in enumerate(statistics)})


def check_norm(
    added: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, shift: Tensor | None
) -> None:
    """Check added and residual [..., hidden] with weight, bias and shift [hidden]."""
    vectors = {"weight": weight} | {name: t for name, t in (("bias", bias), ("shift", shift)) if t is not None}
    rows = {"added": added} | ({} if residual is None else {"residual": residual})
    _check_rows(rows, vectors)


def check_norm_backward(
    upstream: Tensor, total: Tensor, weight: Tensor, mean: Tensor | None, scale: Tensor, gradient: Tensor | None
) -> None:
    """Check gradients and total [..., hidden] with weight [hidden] and the statistics, [...] each."""
    rows = {"total": total, "upstream": upstream} | ({} if gradient is None else {"gradient": gradient})
    _check_rows(rows, {"weight": weight})
    statistics = {"scale": scale} | ({} if mean is None else {"mean": mean})
    for name, tensor in statistics.items():
        if tensor.shape != total.shape[:-1] or tensor.dtype != torch.float32:
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}. It must be torch.float32 {list(total.shape[:-1])}: "
                "pass mean and scale as add_norm returns them."
            )
    _check_devices(total=total, **statistics)


def _check_rows(rows: dict[str, Tensor], vectors: dict[str, Tensor]) -> None:
    first = next(iter(rows.values()))
    sizes = ", ".join(f"{name} {tensor.dtype} {list(tensor.shape)}" for name, tensor in (rows | vectors).items())
    if any(tensor.shape != first.shape or tensor.dtype != first.dtype for tensor in rows.values()):
        raise ValueError(f"The tensors are {sizes}. Those of [..., hidden] must have the same shape and dtype.")
    if first.ndim < 1 or any(tensor.shape != first.shape[-1:] for tensor in vectors.values()):
        raise ValueError(f"The tensors are {sizes}. {' and '.join(vectors)} must be [hidden].")
    if any(tensor.dtype not in _FLOATS for tensor in (first, *vectors.values())):
        raise ValueError(f"The tensors are {sizes}. Use bfloat16, float16 or float32.")
    _check_devices(**rows, **vectors)


def check_bias(upstream: Tensor, values: Tensor, bias: Tensor) -> None:
    """Check gradients and values [..., width] with bias [width]."""
    _check_rows({"upstream": upstream, "values": values}, {"bias": bias})


def check_rotation(mixed: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Check heads [length, batch, KV heads, heads per KV head + 2, d] with angles [length, d / 2]."""
    _check_heads(mixed.ndim == 5 and mixed.shape[3] > 2, mixed, cos, sin)


def check_join(query: Tensor, key: Tensor, value: Tensor, cos: Tensor | None, sin: Tensor | None) -> None:
    """Check queries [length, batch, heads, d] with keys and values, and angles [length, d / 2] if there are any."""
    is_valid = query.ndim == key.ndim == 4 and value.shape == key.shape and (cos is None) == (sin is None)
    is_valid = is_valid and query.shape[2] % key.shape[2] == 0
    is_valid = is_valid and (*query.shape[:2], query.shape[3]) == (*key.shape[:2], key.shape[3])
    _check_heads(is_valid, key, cos, sin, query, value)


def _check_heads(is_valid: bool, heads: Tensor, cos: Tensor | None, sin: Tensor | None, *others: Tensor) -> None:
    """Check angles, dtypes and devices, too."""
    angles = [tensor for tensor in (cos, sin) if tensor is not None]
    sizes = ", ".join(str(list(tensor.shape)) for tensor in (heads, *others, *angles))
    wanted = (len(heads), heads.shape[-1] // 2) if heads.ndim else ()
    if not is_valid or heads.shape[-1] % 2 or any(tensor.shape != wanted for tensor in angles):
        raise ValueError(
            f"Heads, cos and sin are {sizes}. Heads must be [length, batch, KV heads, heads per KV head + 2, d], or "
            "queries [length, batch, heads, d] with keys and values [length, batch, KV heads, d]; cos and sin must be "
            "[length, d / 2]."
        )
    if heads.dtype not in _FLOATS or any(tensor.dtype != heads.dtype for tensor in others):
        raise ValueError(f"Heads are {heads.dtype}. Use bfloat16, float16 or float32, the same for all of them.")
    names = (f"tensor {number}" for number in range(9))
    _check_devices(**dict(zip(names, (heads, *others, *angles), strict=False)))


def check_mixture(logits: Tensor, log_weights: Tensor) -> None:
    """Check logits [experts, batch, vocab] with log weights [batch, experts]."""
    if logits.ndim != 3 or log_weights.shape != (logits.shape[1], logits.shape[0]):
        raise ValueError(
            f"logits are {list(logits.shape)} and log_weights {list(log_weights.shape)}. They must be [experts, batch, "
            "vocab] and [batch, experts]."
        )
    if logits.shape[0] == 0 or logits.shape[2] == 0:
        raise ValueError(
            f"logits are {list(logits.shape)}, [experts, batch, vocab]. A mixture needs at least one expert and one "
            "token of vocabulary."
        )
    if logits.dtype not in _FLOATS:
        raise ValueError(f"logits are {logits.dtype}. Use bfloat16, float16 or float32.")
    if not log_weights.is_floating_point():
        raise ValueError(f"log_weights are {log_weights.dtype}. They must be floating point: use float32 or float64.")
    _check_devices(logits=logits, log_weights=log_weights)


def check_sampling(
    log_weights: Tensor, temperature: float, generator: torch.Generator | None, log_likelihood: Tensor | None
) -> None:
    """Check the temperature, the generator and the running log-likelihoods [batch, experts]."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(
            f"temperature is {temperature}. It must be finite and at least 0, which takes the most likely token."
        )
    if generator is not None and log_weights.device.type not in (generator.device.type, "meta"):
        raise ValueError(
            f"generator is on {generator.device} and log_weights on {log_weights.device}. They must be on the same "
            f"device: use torch.Generator('{log_weights.device}')."
        )
    if log_likelihood is None:
        return
    if log_likelihood.shape != log_weights.shape or not log_likelihood.is_floating_point():
        raise ValueError(
            f"log_likelihood is {log_likelihood.dtype} {list(log_likelihood.shape)}. It must be floating point and "
            f"[batch, experts] = {list(log_weights.shape)}."
        )
    _check_devices(log_weights=log_weights, log_likelihood=log_likelihood)


def _check_devices(**tensors: Tensor) -> None:
    """Check that tensors share a device: a kernel would read a foreign address as its own memory."""
    if len({tensor.device for tensor in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items())
        raise ValueError(f"The tensors are on different devices: {places}. Move all of them to the same device.")


def refuse_target(target: int, rows: int, ignore_index: int) -> NoReturn:
    """Raise ValueError for a target outside of the vocabulary."""
    raise ValueError(
        f"Target {target} is not in the vocabulary. Use 0 to {rows - 1}, or {ignore_index} for targets to ignore."
    )
