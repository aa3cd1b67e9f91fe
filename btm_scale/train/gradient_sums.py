"""Gradient accumulation of ZeRO 1 in float32, in the matrix products that compute the gradients, without a copy.

DeepSpeed's BF16_Optimizer copies every bfloat16 gradient to float32 and adds the copy. Megatron-core's linear layers
can add their product to `main_grad` instead, with a kernel of Apex that `add_product_` replaces.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

from btm_scale.kernels import add_product_
from btm_scale.model.shape import ModelShape


def sum_in_products(model: Any, optimizer: Any) -> None:
    """Accumulate gradients in the optimizer's float32 sums: in the products of linear layers, else without a copy.

    `optimizer` is DeepSpeed's BF16_Optimizer of the model, a Megatron-core GPTModel. With its `immediate_grad_update`
    hooks of gradients add them, which the products here have none of.
    """
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_add)
    sums = {
        parameter: total
        for group, totals in zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
        for parameter, total in zip(group, totals, strict=True)
    }
    linear = (layers.ColumnParallelLinear, layers.RowParallelLinear)
    in_products = set()
    for module in model.modules():
        # The loss computes the gradient of the LM head. Frozen weights are unknown to the optimizer.
        if isinstance(module, linear) and module is not model.output_layer and module.weight in sums:
            module.weight.main_grad = sums[module.weight].view_as(module.weight)
            module.gradient_accumulation_fusion = True
            in_products.add(module.weight)

    @torch.no_grad()
    def update(parameter: Tensor, group: int, index: int, clear: bool) -> None:
        """Replace BF16_Optimizer._update_hp_grad, which is called with every parameter after a backward pass."""
        total = optimizer.fp32_groups_gradients[group][index]
        if parameter.grad is not None:
            total.add_(parameter.grad.view_as(total))
            if clear:
                parameter.grad.zero_()
        elif parameter not in in_products:
            return
        parameter._hp_grad = total  # type: ignore[attr-defined]
        optimizer.fp32_groups_has_gradients[group][index] = True

    optimizer._update_hp_grad = update


def _add(inputs: Tensor, gradients: Tensor, total: Tensor) -> None:
    """Add gradients^T inputs, [tokens, ...] each, to a weight's sum."""
    add_product_(total, gradients, inputs)


def bytes_per_micro_batch(shape: ModelShape) -> float:
    """Return the memory traffic of accumulation per micro-batch in bytes, beyond writing the gradients alone.

    A layer's product reads and writes a float32 sum instead of writing a bfloat16 gradient. Other gradients are read,
    and their sums read and written.
    """
    matrices = shape.layer_matrices()
    return (8.0 - 2.0) * matrices + 10.0 * (shape.parameters - matrices)
