"""Load and gather the weights of a tensor parallel model under Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from btm_scale.model.families.family import Entry
from btm_scale.model.gpt import ExpertModel, padded_vocabulary
from btm_scale.model.hf_names import cut, from_huggingface, join, table, to_huggingface
from btm_scale.model.partition import complete
from btm_scale.model.shape import ModelShape


def gather_whole(entry: Entry, part: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the full Megatron-core tensor on every tensor parallel rank; `part` is this rank's shard."""
    if group is None or entry.cut is None:
        return part
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, part.contiguous(), group=group)
    return join(entry, parts)


def local_part(entry: Entry, read: Callable[[str], Tensor], shape: ModelShape, tensor_rank: int, tensor: int) -> Tensor:
    """Return this rank's shard of a Megatron-core tensor; `read` returns Hugging Face tensors by name."""
    full = from_huggingface(entry, read, shape, padded_vocabulary(shape.vocabulary, tensor))
    return cut(entry, full, tensor)[tensor_rank]


def load_weights(model: ExpertModel, read: Callable[[str], Tensor], tensor_rank: int, tensor: int) -> None:
    """Set every parameter of a model that is not yet wrapped by an engine."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for entry in table(model.shape):
            part = local_part(entry, read, model.shape, tensor_rank, tensor)
            with complete(parameters[entry.megatron], changes=True) as parameter:
                parameter.copy_(part)


def huggingface_tensors(
    shape: ModelShape, part: Callable[[Entry], Tensor], group: dist.ProcessGroup | None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every Hugging Face tensor; `part` returns this rank's shard of a Megatron-core tensor.

    Collective: every tensor parallel rank must exhaust the iterator.
    """
    for entry in table(shape):
        full = gather_whole(entry, part(entry), group)
        yield from to_huggingface(entry, full, shape).items()


def huggingface_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all Hugging Face tensors by name, without allocating them."""
    rows = shape.vocabulary
    sizes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (rows, shape.hidden),
        "output_layer.weight": (rows, shape.hidden),
        "position_embeddings.weight": (shape.positions, shape.hidden),
        "linear_qkv.weight": (shape.query_key_value_width, shape.hidden),
        "linear_qkv.bias": (shape.query_key_value_width,),
        "q_layernorm.weight": (shape.head_size,),
        "k_layernorm.weight": (shape.head_size,),
        "linear_proj.weight": (shape.hidden, shape.query_width),
        "router.weight": (shape.experts, shape.hidden),
        "linear_fc1.weight": (shape.up_width, shape.hidden),
        "linear_fc1.bias": (shape.up_width,),
        "linear_fc2.weight": (shape.hidden, shape.ffn),
    }
    result: dict[str, tuple[int, ...]] = {}
    for entry in table(shape):
        size = sizes.get(".".join(entry.megatron.split(".")[-2:]), (shape.hidden,))
        blank = torch.empty(size, device="meta")
        result |= {name: tuple(tensor.shape) for name, tensor in to_huggingface(entry, blank, shape).items()}
    return result
