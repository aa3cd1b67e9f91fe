"""Convert between Megatron-core and Hugging Face tensors.

Each family gives the names. Every conversion only permutes or splits elements, so optimizer moments are converted like
weights.
"""

from __future__ import annotations

from collections.abc import Callable

from btm_scale.model.families.family import Entry
from btm_scale.model.shape import ModelShape
from btm_scale.util.imports import torch


def table(shape: ModelShape) -> list[Entry]:
    """Return every tensor of a model, in layer order."""
    return list(shape.traits.tensors(shape))


def to_huggingface(entry: Entry, full: torch.Tensor, shape: ModelShape) -> dict[str, torch.Tensor]:
    """Return the Hugging Face tensors of a full Megatron-core tensor, without vocabulary padding."""
    if entry.form in ("plain", "transposed"):
        parts = [full.t() if entry.form == "transposed" else full]
    elif entry.form == "vocabulary":
        parts = [full[: shape.vocabulary]]
    elif entry.form == "gate_up":
        parts = list(full.chunk(2))
    else:
        # Rows are grouped by KV head: its queries, then its key, then its value.
        grouped = full.view(shape.kv_heads, shape.heads // shape.kv_heads + 2, shape.head_size, *full.shape[1:])
        parts = [part.reshape(-1, *full.shape[1:]) for part in (grouped[:, :-2], grouped[:, -2], grouped[:, -1])]
        if entry.form == "query_key_value_fused":
            parts = [torch.cat(parts).t() if full.dim() == 2 else torch.cat(parts)]
    return {name: part.contiguous() for name, part in zip(entry.huggingface, parts, strict=True)}


def from_huggingface(entry: Entry, read: Callable[[str], torch.Tensor], shape: ModelShape, rows: int) -> torch.Tensor:
    """Return the full Megatron-core tensor; `rows` is the vocabulary size with padding, which is zero."""
    parts = [read(name) for name in entry.huggingface]
    if entry.form == "plain":
        return parts[0]
    if entry.form == "transposed":
        return parts[0].t().contiguous()
    if entry.form == "vocabulary":
        padding = parts[0].new_zeros(rows - len(parts[0]), parts[0].shape[1])
        return torch.cat([parts[0], padding])
    if entry.form == "gate_up":
        return torch.cat(parts)
    if entry.form == "query_key_value_fused":
        fused = parts[0].t() if parts[0].dim() == 2 else parts[0]
        parts = list(fused.chunk(3))
    tail = parts[0].shape[1:]
    query, key, value = (part.reshape(shape.kv_heads, -1, shape.head_size, *tail) for part in parts)
    return torch.cat([query, key, value], dim=1).reshape(-1, *tail)


def with_new_rows(read: Callable[[str], torch.Tensor], shape: ModelShape) -> Callable[[str], torch.Tensor]:
    """Return a `read` whose embeddings have a row per token: the rows that are missing are the mean of the others."""
    names = {name for entry in table(shape) if entry.form == "vocabulary" for name in entry.huggingface}

    def extended(name: str) -> torch.Tensor:
        tensor = read(name)
        missing = shape.vocabulary - len(tensor)
        if name not in names or missing <= 0:
            return tensor
        mean = tensor.mean(0, keepdim=True, dtype=torch.float32).to(tensor.dtype)
        return torch.cat([tensor, mean.expand(missing, -1)])

    return extended


def cut(entry: Entry, full: torch.Tensor, tensor: int) -> list[torch.Tensor]:
    """Split a full Megatron-core tensor into its tensor parallel shards, in rank order."""
    if tensor == 1 or entry.cut is None:
        return [full] * tensor
    if entry.form == "gate_up":
        halves = (half.chunk(tensor) for half in full.chunk(2))
        return [torch.cat(pair) for pair in zip(*halves, strict=True)]
    return [part.contiguous() for part in full.chunk(tensor, dim=entry.cut)]


def join(entry: Entry, parts: list[torch.Tensor]) -> torch.Tensor:
    """Join tensor parallel shards, in rank order, into the full Megatron-core tensor."""
    if len(parts) == 1 or entry.cut is None:
        return parts[0]
    if entry.form == "gate_up":
        halves = [part.chunk(2) for part in parts]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(parts, dim=entry.cut)
