"""Compare attention of context ranks with that of one rank: `share_sequences.py SPEC.json`.

The spec has `ranks`, `heads` (pairs of heads and KV heads) and `result`, for the largest errors of this rank's part of
the output and of the gradients, in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers.worlds import fork_world, read_spec
from megatron.core.transformer.transformer_config import TransformerConfig

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.attention import CausalAttention
from btm_scale.model.context_parallel import ContextAttention, ContextPart
from btm_scale.model.rotary import Rotary
from btm_scale.model.shape import ModelShape

LENGTH, BATCH, SIZE = 24, 2, 8


def errors(part: ContextPart, heads: int, kv_heads: int) -> list[float]:
    torch.manual_seed(heads + kv_heads)
    config = TransformerConfig(
        num_layers=1, hidden_size=heads * SIZE, num_attention_heads=heads, num_query_groups=kv_heads
    )
    sizes = {"heads": heads, "kv_heads": kv_heads, "positions": LENGTH}
    rotary = Rotary(ModelShape(layers=1, hidden=heads * SIZE, ffn=8, vocabulary=8, **sizes))
    given = [torch.randn(LENGTH, BATCH, count, SIZE, dtype=torch.float64) for count in (heads, kv_heads, kv_heads)]
    upstream = torch.randn(LENGTH, BATCH, heads * SIZE, dtype=torch.float64)
    complete = [one.clone().requires_grad_() for one in given]
    expected = CausalAttention(config, rotary)(*complete)
    gradients = torch.autograd.grad(expected, complete, upstream)

    size = LENGTH // part.parts
    here = slice(part.index * size, (part.index + 1) * size)
    own = [one[here].clone().requires_grad_() for one in given]
    actual = ContextAttention(config, core=CausalAttention, part=part, rotary=rotary)(*own)
    own_gradients = torch.autograd.grad(actual, own, upstream[here])
    pairs = zip((actual, *own_gradients), (expected, *gradients), strict=True)
    return [float((one - other[here]).abs().max()) for one, other in pairs]


def rank(spec: dict[str, Any]) -> None:
    group = ExpertGroup.join(Layout(context=spec["ranks"], precision="fp32"))
    assert group.context_group is not None
    part = ContextPart.of(group.context_group)
    result = [errors(part, *heads) for heads in spec["heads"]]
    Path(f"{spec['result']}-{group.rank}").write_text(json.dumps(result))
    group.leave()


if __name__ == "__main__":
    for one in read_spec():
        fork_world(one["ranks"], rank, one)
