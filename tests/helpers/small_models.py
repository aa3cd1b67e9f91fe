"""Small random weights of awkward shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Weights = Mapping[str, torch.Tensor]
Save = Callable[..., Path]

# Hard for a layout: a vocabulary that no tensor parallel degree divides, and fewer KV heads than heads.
TINY_SHAPE = {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "positions": 16, "vocabulary": 65}
# Similar sizes, in the keys of a Hugging Face config.
HUGGINGFACE_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 65,
}
WEIGHTS = [0.3, 1.0, 0.7, 2.0]  # of the four `models`


def learnable_text(step: int, sequences: int, positions: int, vocabulary: int) -> torch.Tensor:
    """Return the batch of a step [sequences, positions + 1]: text from which a tiny model learns in a few steps."""
    draw = torch.Generator().manual_seed(step)
    starts = torch.randint(0, vocabulary, (sequences, 1), generator=draw)
    strides = torch.randint(1, 4, (sequences, 1), generator=draw)
    return (starts + strides * torch.arange(positions + 1)) % vocabulary


def random_weights(seed: int, dtype: torch.dtype = torch.bfloat16, hidden: int = 16) -> dict[str, torch.Tensor]:
    """Return a few tensors of different ranks and odd sizes, one of them boolean."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {
        "model.embed_tokens.weight": (37, hidden),
        "model.layers.0.mlp.up_proj.weight": (hidden * 3 + 1, hidden),
        "model.layers.0.mlp.down_proj.weight": (hidden, hidden * 3 + 1),
        "model.norm.weight": (hidden,),
    }
    floats = {name: torch.randn(shape, generator=draw).to(dtype) for name, shape in shapes.items()}
    return floats | {"model.layers.0.mask": torch.ones(3, 3, dtype=torch.bool).tril()}
