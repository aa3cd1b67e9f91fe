"""Gradient accumulation in float32 without ZeRO, where DeepSpeed would sum micro-batches in the weights' dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Float32Sums:
    """Sums every parameter's gradients in float32 and stores the sum, rounded once, after the last micro-batch."""

    def __init__(self, model: torch.nn.Module, is_last: Callable[[], bool]) -> None:
        self._is_last = is_last
        self._sums: dict[Tensor, Tensor] = {}
        for parameter in filter(lambda one: one.requires_grad, model.parameters()):
            parameter.register_post_accumulate_grad_hook(self._take)

    def _take(self, parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        total = self._sums.pop(parameter, None)
        total = gradient.float() if total is None else total.add_(gradient)
        if self._is_last():
            parameter.grad = total.to(parameter.dtype)
        else:
            self._sums[parameter] = total
            parameter.grad = None
