"""Measure what autograd keeps for the backward pass: `measure_activations.py SPEC.json`.

The spec has `cases` (name: `shape`, `layout`, `micro_batch`, `documents`) and `result`. For each case the script writes
the peak bytes of tensors that autograd holds during one forward and backward pass with `meta` in place of a GPU,
without weights and without the weight gradient of the LM head, to `RESULT-RANKS`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.fx.experimental._config as fake_config
from helpers.single_job import model_of
from helpers.worlds import fork_world, joined_anew, read_spec

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model import gpt
from btm_scale.model.gpt import ExpertModel
from btm_scale.model.shape import ModelShape

GPU = torch.device("meta")


class FusedRMSNorm(torch.autograd.Function):
    """PyTorch's RMS norm as it is on CUDA: one kernel, which keeps its input and a number per row."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        scale = values.float().square().mean(-1, keepdim=True).add(epsilon).rsqrt()
        ctx.save_for_backward(values, weight, scale)
        return (values * scale).to(values.dtype) * weight

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        values, weight, _ = ctx.saved_tensors
        return torch.empty_like(values), torch.empty_like(weight), None


def fused_rms_norm(values: torch.Tensor, _: Any, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return FusedRMSNorm.apply(values, weight, epsilon)


class FlashAttention(torch.autograd.Function):
    """PyTorch's attention as its flash kernel is on CUDA; on `meta` it would hold every score."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        attended = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, attended, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return attended

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def flash_attention(
    *heads: torch.Tensor, is_causal: bool, enable_gqa: bool = False, attn_mask: None = None
) -> torch.Tensor:
    assert is_causal
    return FlashAttention.apply(*heads)


class Saved:
    """A tensor that autograd holds, counted by its storage until it is released."""

    alive: Counter[int] = Counter()
    bytes = peak = 0
    weights: set[int] = set()

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.storage = tensor.untyped_storage()
        Saved.alive[self.storage._cdata] += 1
        if Saved.alive[self.storage._cdata] == 1 and self.storage._cdata not in Saved.weights:
            Saved.bytes += self.storage.nbytes()
            Saved.peak = max(Saved.peak, Saved.bytes)

    def __del__(self) -> None:
        Saved.alive[self.storage._cdata] -= 1
        if Saved.alive[self.storage._cdata] == 0 and self.storage._cdata not in Saved.weights:
            Saved.bytes -= self.storage.nbytes()


def measure(model: ExpertModel, tokens: torch.Tensor) -> int:
    head = model.head.shape

    def pack(tensor: torch.Tensor) -> Any:
        # The gradient that the fused loss computes in the forward pass is planned as the head's.
        return tensor if tensor.shape == head else Saved(tensor)

    Saved.alive.clear()
    Saved.bytes = Saved.peak = 0
    Saved.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: getattr(saved, "tensor", saved)):
        model(tokens, tokens).backward()
    return Saved.peak


def measure_all(ranks: int, spec: dict[str, Any]) -> None:
    result: dict[str, int] = {}
    group: ExpertGroup | None = None
    for name, case in spec["cases"].items():
        layout = Layout.model_validate(case["layout"])
        if layout.ranks != ranks:
            continue
        group = joined_anew(group, layout)
        torch.cuda.current_device = lambda: GPU  # type: ignore[assignment,return-value]
        gpt.gpu = lambda: torch.device("cpu")  # from where `to_empty` moves it
        shape = ModelShape.model_validate(case["shape"])
        model = model_of(group, shape, on_cpu=False).to_empty(device=GPU)
        model.end_of_text = 2 if case["documents"] else None
        tokens = torch.zeros(case["micro_batch"], shape.positions, dtype=torch.int64, device=GPU)
        model(tokens, tokens)  # the cosines and sines of rotary positions are cached
        result[name] = measure(model, tokens)
    assert group is not None
    if group.is_first:
        Path(f"{spec['result']}-{ranks}").write_text(json.dumps(result))
    group.leave()


def as_on_cuda(ranks: int, spec: dict[str, Any]) -> None:
    torch.nn.functional.rms_norm = fused_rms_norm
    torch.nn.functional.scaled_dot_product_attention = flash_attention
    torch.nn.init.normal_ = lambda weight, *_, **__: weight
    # `meta` has no values: each token is a document, whose boundaries the host reads.
    torch.Tensor.__int__ = lambda _: 1  # type: ignore[method-assign]
    torch.Tensor.tolist = lambda tensor: list(range(len(tensor)))  # type: ignore[method-assign]
    with fake_config.patch(meta_nonzero_assume_all_nonzero=True):
        measure_all(ranks, spec)


if __name__ == "__main__":
    given = read_spec()
    for ranks in {Layout.model_validate(case["layout"]).ranks for case in given["cases"].values()}:
        fork_world(ranks, as_on_cuda, ranks, given)
