"""Modules that compute the same layer of several models at once, from weights [experts, ...].

Their inputs have the rows of all experts, one expert after the other: [experts x rows, ...]. What has no weights, such
as attention and rotary embeddings, treats them as one batch.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from btm_scale.model.float32_head import Float32Head, StackedFloat32Head

Weights = Mapping[str, Tensor]


class StackedLinear(nn.Module):
    """One matrix product for all experts."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Args: `weight` [experts, in, out], of any strides, and `bias` [experts, out]."""
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias
        self._bias = None if bias is None else bias.unsqueeze(1)

    def forward(self, states: Tensor) -> Tensor:
        """Return [experts x rows, ..., out] of [experts x rows, ..., in]."""
        rows = states.reshape(len(self.weight), -1, states.shape[-1])
        product = torch.bmm(rows, self.weight) if self._bias is None else torch.baddbmm(self._bias, rows, self.weight)
        return product.view(*states.shape[:-1], product.shape[-1])


class StackedEmbedding(nn.Module):
    """One lookup for all experts."""

    first: Tensor

    def __init__(self, weight: Tensor) -> None:
        """Args: `weight` [experts, rows of the table, hidden]."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        first = torch.arange(len(weight), device=weight.device).unsqueeze(1) * weight.shape[1]
        self.register_buffer("first", first, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return [experts x rows, tokens, hidden] of int64 [experts x rows, tokens]."""
        rows = ids.reshape(len(self.weight), -1) + self.first
        return nn.functional.embedding(rows, self.weight.flatten(0, 1)).view(*ids.shape, -1)


class StackedNorm(nn.Module):
    """LayerNorm or RMSNorm, followed by each expert's weights."""

    def __init__(self, normalize: Callable[[Tensor], Tensor], weight: Tensor, bias: Tensor | None) -> None:
        """Args: `weight` and `bias` [experts, hidden], and what normalizes the last dimension of a tensor."""
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias
        self._normalize = normalize
        self._weight, self._compute = weight.unsqueeze(1), weight.dtype
        self._bias = None if bias is None else bias.unsqueeze(1)

    def forward(self, states: Tensor) -> Tensor:
        """Return the same shape, [experts x rows, ..., hidden]."""
        rows = self._normalize(states.to(self._compute)).view(len(self.weight), -1, states.shape[-1])
        scaled = rows * self._weight if self._bias is None else torch.addcmul(self._bias, rows, self._weight)
        return scaled.view(states.shape).to(states.dtype)


def can_stack(module: nn.Module) -> bool:
    """Return whether a module with parameters has a stacked form."""
    kind = type(module)
    if kind in (nn.Linear, nn.LayerNorm, Float32Head) or _is_conv1d(module):
        return True
    if kind is nn.Embedding:
        return module.max_norm is None
    return _is_rms_norm(module) and _rms_form(module) is not None


def stacked_module(module: nn.Module, weights: Weights) -> nn.Module:
    """Return the stacked form of a module for which `can_stack` holds. `weights` has its parameters by name."""
    weight, bias = weights["weight"], weights.get("bias")
    if isinstance(module, Float32Head):
        return StackedFloat32Head(weight, bias)
    if isinstance(module, nn.Linear):
        return StackedLinear(weight.transpose(1, 2), bias)
    if _is_conv1d(module):
        return StackedLinear(weight, bias)
    if isinstance(module, nn.Embedding):
        return StackedEmbedding(weight)
    shape = tuple(weight.shape[1:])
    if isinstance(module, nn.LayerNorm):
        normalize = functools.partial(nn.functional.layer_norm, normalized_shape=shape, eps=module.eps)
        return StackedNorm(normalize, weight, bias)
    normalize = functools.partial(nn.functional.rms_norm, normalized_shape=shape, eps=_eps(module))
    # 1 + weight would be rounded in 16 bits.
    return StackedNorm(normalize, weight.float() + 1 if _rms_form(module) == "offset" else weight, None)


def _is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's linear layer, whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    names = [name for name, _ in module.named_parameters()]
    return type(module).__name__.endswith("RMSNorm") and names == ["weight"] and weight is not None and weight.ndim == 1


def _eps(module: nn.Module) -> float:
    value: Any = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    return float(value)


_FORMS: dict[tuple[type, int, float], str | None] = {}


def _rms_form(module: nn.Module) -> Literal["plain", "offset"] | None:
    """Return whether an RMSNorm multiplies by its weight or by 1 + weight, found by trying it; None if by neither."""
    try:
        key = (type(module), len(module.weight), _eps(module))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    if key not in _FORMS:
        _FORMS[key] = _tried_form(module)
    return _FORMS[key]  # type: ignore[return-value]


@torch.no_grad()
def _tried_form(module: nn.Module) -> str | None:
    size, random = len(module.weight), torch.Generator().manual_seed(0)  # type: ignore[arg-type]
    weight, states = (torch.randn(*shape, generator=random, device="cpu") for shape in ((size,), (1, 3, size)))
    trial = copy.deepcopy(module, {id(module.weight): nn.Parameter(weight)})
    try:
        found = trial(states)
    except Exception:  # whatever a module raises that is not a plain norm
        return None
    normal = nn.functional.rms_norm(states, (size,), eps=_eps(module))
    if torch.allclose(found, normal * weight, atol=1e-5):
        return "plain"
    return "offset" if torch.allclose(found, normal * (1 + weight), atol=1e-5) else None
