"""RMS and layer norm for Megatron-core's layers, which tensor parallel ranks may compute on parts of a sequence.

Megatron-core's own wrapper around PyTorch's norms refuses sequence parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RMSNorm(torch.nn.RMSNorm):
    """PyTorch's RMS norm, built as Megatron-core builds its norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        mark_shared(self, config)


class LayerNorm(torch.nn.LayerNorm):
    """PyTorch's layer norm, built as Megatron-core builds its norms."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        mark_shared(self, config)


def mark_shared(module: torch.nn.Module, config: TransformerConfig) -> None:
    """Say, as Megatron-core does, that each tensor rank's gradient is of its part of the sequence only."""
    for parameter in module.parameters():
        parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
