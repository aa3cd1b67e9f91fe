"""A layer for CPUs: its gated MLP takes fewer passes over memory than Megatron-core and autograd do."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.nn import functional


class SwiGlu(torch.autograd.Function):
    """gate and up, values [..., 2 width] -> silu(gate) * up, [..., width], with the bits of these operators.

    The two gradients are written into their halves of one tensor instead of being concatenated.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return [..., width]."""
        gate, up = values.chunk(2, dim=-1)
        activated = functional.silu(gate)
        ctx.save_for_backward(values, activated)
        return activated * up

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Return the gradient of the values, [..., 2 width]."""
        values, activated = ctx.saved_tensors
        gate, up = values.chunk(2, dim=-1)
        result = torch.empty_like(values)
        for_gate, for_up = result.chunk(2, dim=-1)
        torch.mul(gradients[0], activated, out=for_up)
        torch.ops.aten.silu_backward.grad_input(gradients[0] * up, gate, grad_input=for_gate)
        return result


class CpuLayer(TransformerLayer):
    """A layer whose gated MLP without biases computes `SwiGlu` on a CPU. Megatron-core computes everything else."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        if isinstance(self.mlp, MLP) and self.config.gated_linear_unit and not self.config.add_bias_linear:
            # Its class must stay MLP, by which Megatron-core decides on the process group.
            self.mlp.forward = partial(_gated_mlp, self.mlp)


def _gated_mlp(mlp: MLP, hidden_states: Tensor, **named: Any) -> tuple[Tensor, Tensor | None]:
    """Return an MLP's output and no bias; see `MLP.forward`."""
    if hidden_states.device.type != "cpu":
        result: tuple[Tensor, Tensor | None] = MLP.forward(mlp, hidden_states, **named)
        return result
    values, _bias = mlp.linear_fc1(hidden_states)
    output, last_bias = mlp.linear_fc2(SwiGlu.apply(values))
    return output, last_bias
