"""Megatron-core's tensors and Hugging Face's: their names, and how the one is made of the other.

One table for GPT-2, and one for Llama and its kin. Every change is a permutation or a cut of numbers, so optimizer
moments go through the same table as the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from btm_scale.model.shape import ModelShape

Form = Literal["plain", "transposed", "query_key_value", "query_key_value_fused", "gate_up", "vocabulary"]


@dataclass(frozen=True)
class Entry:
    """One Megatron-core tensor and the Hugging Face tensors that hold the same numbers."""

    megatron: str
    huggingface: tuple[str, ...]
    form: Form = "plain"
    cut: int | None = None  # the dimension that tensor parallel ranks share, if any


def table(shape: ModelShape) -> list[Entry]:
    """Every tensor of a model, in the order of its layers."""
    return list(_rotary(shape) if shape.rotary else _gpt2(shape))


def _rotary(shape: ModelShape) -> Iterator[Entry]:
    yield Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary", 0)
    for i in range(shape.layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        yield Entry(ours + "input_layernorm.weight", (theirs + "input_layernorm.weight",))
        heads = tuple(f"{attention}{part}_proj.weight" for part in "qkv")
        yield Entry(ours + "self_attention.linear_qkv.weight", heads, "query_key_value", 0)
        if shape.query_key_value_bias:
            biases = tuple(f"{attention}{part}_proj.bias" for part in "qkv")
            yield Entry(ours + "self_attention.linear_qkv.bias", biases, "query_key_value", 0)
        for part in "qk" if shape.head_norms else "":
            norm = f"{ours}self_attention.{part}_layernorm.weight"
            yield Entry(norm, (f"{attention}{part}_norm.weight",))
        yield Entry(ours + "self_attention.linear_proj.weight", (attention + "o_proj.weight",), cut=1)
        yield Entry(ours + "pre_mlp_layernorm.weight", (theirs + "post_attention_layernorm.weight",))
        halves = (mlp + "gate_proj.weight", mlp + "up_proj.weight")
        yield Entry(ours + "mlp.linear_fc1.weight", halves, "gate_up", 0)
        yield Entry(ours + "mlp.linear_fc2.weight", (mlp + "down_proj.weight",), cut=1)
    yield Entry("decoder.final_layernorm.weight", ("model.norm.weight",))
    if not shape.tied:
        yield Entry("output_layer.weight", ("lm_head.weight",), "vocabulary", 0)


def _gpt2(shape: ModelShape) -> Iterator[Entry]:
    # Hugging Face's GPT-2 keeps its matrices as [in, out].
    yield Entry("embedding.word_embeddings.weight", ("transformer.wte.weight",), "vocabulary", 0)
    yield Entry("embedding.position_embeddings.weight", ("transformer.wpe.weight",))
    for i in range(shape.layers):
        ours, theirs = f"decoder.layers.{i}.", f"transformer.h.{i}."
        for norm, name in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
            for part in ("weight", "bias"):
                yield Entry(f"{ours}{norm}.{part}", (f"{theirs}{name}.{part}",))
        fused = ours + "self_attention.linear_qkv."
        yield Entry(fused + "weight", (theirs + "attn.c_attn.weight",), "query_key_value_fused", 0)
        yield Entry(fused + "bias", (theirs + "attn.c_attn.bias",), "query_key_value_fused", 0)
        out = ours + "self_attention.linear_proj."
        yield Entry(out + "weight", (theirs + "attn.c_proj.weight",), "transposed", 1)
        yield Entry(out + "bias", (theirs + "attn.c_proj.bias",))
        yield Entry(ours + "mlp.linear_fc1.weight", (theirs + "mlp.c_fc.weight",), "transposed", 0)
        yield Entry(ours + "mlp.linear_fc1.bias", (theirs + "mlp.c_fc.bias",), cut=0)
        yield Entry(ours + "mlp.linear_fc2.weight", (theirs + "mlp.c_proj.weight",), "transposed", 1)
        yield Entry(ours + "mlp.linear_fc2.bias", (theirs + "mlp.c_proj.bias",))
    for part in ("weight", "bias"):
        yield Entry(f"decoder.final_layernorm.{part}", (f"transformer.ln_f.{part}",))


def to_huggingface(entry: Entry, full: Tensor, shape: ModelShape) -> dict[str, Tensor]:
    """The Hugging Face tensors of a whole Megatron-core tensor; vocabulary padding is left out."""
    if entry.form in ("plain", "transposed"):
        parts = [full.t() if entry.form == "transposed" else full]
    elif entry.form == "vocabulary":
        parts = [full[: shape.vocabulary]]
    elif entry.form == "gate_up":
        parts = list(full.chunk(2))
    else:
        # Rows are grouped by key-value head: its queries, then its key, then its value.
        grouped = full.view(shape.kv_heads, shape.heads // shape.kv_heads + 2, shape.head_size, *full.shape[1:])
        parts = [part.reshape(-1, *full.shape[1:]) for part in (grouped[:, :-2], grouped[:, -2], grouped[:, -1])]
        if entry.form == "query_key_value_fused":
            parts = [torch.cat(parts).t() if full.dim() == 2 else torch.cat(parts)]
    return {name: part.contiguous() for name, part in zip(entry.huggingface, parts, strict=True)}


def from_huggingface(entry: Entry, read: Callable[[str], Tensor], shape: ModelShape, rows: int) -> Tensor:
    """The whole Megatron-core tensor; `rows` is the vocabulary with its padding, which is zero."""
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


def cut(entry: Entry, full: Tensor, tensor: int) -> list[Tensor]:
    """The tensor parallel ranks' parts of a whole Megatron-core tensor, in the order of the ranks."""
    if tensor == 1 or entry.cut is None:
        return [full] * tensor
    if entry.form == "gate_up":
        halves = (half.chunk(tensor) for half in full.chunk(2))
        return [torch.cat(pair) for pair in zip(*halves, strict=True)]
    return [part.contiguous() for part in full.chunk(tensor, dim=entry.cut)]


def join(entry: Entry, parts: list[Tensor]) -> Tensor:
    """The whole Megatron-core tensor from its tensor parallel ranks' parts."""
    if len(parts) == 1 or entry.cut is None:
        return parts[0]
    if entry.form == "gate_up":
        halves = [part.chunk(2) for part in parts]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])
    return torch.cat(parts, dim=entry.cut)
