"""AdamW's parameter groups, and other details of the objects around DeepSpeed's engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from btm_scale.model.partition import complete_shape

RATE_SCALE = "rate_scale"  # of a parameter group: its learning rate as a multiple of that of the step


def parameter_groups(model: torch.nn.Module, weight_decay: float, router_rate: float = 1.0) -> list[dict[str, Any]]:
    """Return AdamW's parameter groups: matrices decay; norms and biases, which have one dimension, do not.

    The routers of a mixture of experts are trained at `router_rate` times the learning rate.
    """
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (".mlp.router." in name, len(complete_shape(parameter)) > 1)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": groups[is_router, is_matrix],
            "weight_decay": weight_decay if is_matrix else 0.0,
            RATE_SCALE: router_rate if is_router else 1.0,
        }
        for is_router, is_matrix in ((False, True), (False, False), (True, True))
        if (is_router, is_matrix) in groups
    ]


def scaler_attributes(scaler: Any) -> list[str]:
    """Return the attributes that hold a loss scaler's state; DeepSpeed has several kinds of scaler."""
    names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
    return [name for name in names if hasattr(scaler, name)]


def empty(parameters: Iterable[torch.nn.Parameter], holders: Iterable[object]) -> None:
    """Release the memory of parameters, and remove every attribute of the objects that hold them."""
    for parameter in parameters:
        parameter.grad = None
        parameter.data = parameter.data.new_empty(0)
    for holder in holders:
        vars(holder).clear()
