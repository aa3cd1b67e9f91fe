"""RMS norm and layer norm for Megatron-core's layers, with sequence parallelism.

Megatron-core's wrapper around PyTorch's norms does not support sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMS norm with the constructor that Megatron-core expects."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        mark_shared(self, config)


class LayerNorm(torch.nn.LayerNorm):
    """PyTorch's layer norm with the constructor that Megatron-core expects."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        mark_shared(self, config)


def mark_shared(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Mark parameters, as Megatron-core does, whose gradient on a tensor rank covers only its part of the sequence."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
