"""Output projections whose logits are float32, whatever the dtype of the model.

Rounded logits would shift the posterior's log-odds. Products of 16-bit numbers are exact in float32, so on NVIDIA GPUs
the tensor cores multiply the 16-bit weights and add in float32; elsewhere the weights are widened once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Float32Head(nn.Module):
    """The output projection of one model."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        weight = head.weight.detach()
        # Parameters, because some classes of transformers share a head's bias.
        weight = weight if adds_in_float32(weight) else weight.float()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if head.bias is None else nn.Parameter(head.bias.detach().float(), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [..., vocabulary] of hidden states [..., hidden]."""
        if self.weight.dtype == torch.float32 or hidden.dtype != self.weight.dtype:
            return nn.functional.linear(hidden.float(), self.weight.float(), self.bias)
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits: Tensor = torch.mm(rows, self.weight.T, out_dtype=torch.float32).view(*hidden.shape[:-1], -1)
        return logits if self.bias is None else logits + self.bias


class StackedFloat32Head(nn.Module):
    """The output projections of several models, for rows that belong to the models in turn."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """Args: `weight` [experts, vocabulary, hidden] and `bias` [experts, vocabulary]."""
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), bias

    def forward(self, hidden: Tensor) -> Tensor:
        """Return float32 logits [experts x rows, ..., vocabulary] of hidden states [experts x rows, ..., hidden]."""
        rows = hidden.reshape(len(self.weight), -1, hidden.shape[-1])
        if self.weight.dtype == torch.float32 or rows.dtype != self.weight.dtype:
            logits = torch.bmm(rows.float(), self.weight.float().transpose(1, 2))
        else:
            logits = torch.bmm(rows, self.weight.transpose(1, 2), out_dtype=torch.float32)
        if self.bias is not None:
            logits += self.bias.unsqueeze(1)
        return logits.view(*hidden.shape[:-1], -1)


def adds_in_float32(weight: Tensor) -> bool:
    """Return whether products with these 16-bit weights have float32 results; `meta` counts as a GPU."""
    is_gpu = weight.is_meta or (weight.is_cuda and torch.version.hip is None)
    return is_gpu and weight.dtype in (torch.bfloat16, torch.float16)
