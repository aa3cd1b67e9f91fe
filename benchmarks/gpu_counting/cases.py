"""What is counted: the loss of a micro-batch, a layer, and the sums of gradients, each at a real shape on `meta`."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from btm_scale.config.model import ModelConfig
from btm_scale.model.shape import PRESETS, ModelShape
from gpu_counting.counter import Counts, counted

META = torch.device("meta")
_OTHERS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "ffn": 14_336, "tied": False}
}


@dataclass(frozen=True)
class Case:
    """A micro-batch of `sequences` of `length` tokens on one of `tensor` ranks."""

    preset: str
    sequences: int
    length: int
    vocabulary: int
    tensor: int = 1

    @property
    def shape(self) -> ModelShape:
        sizes: dict[str, Any] = {"preset": self.preset} if self.preset in PRESETS else dict(_OTHERS[self.preset])
        return ModelConfig(**sizes).shape(self.vocabulary, self.length)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


CASES = {
    "paper-125m": Case("gpt2-125m", 32, 1024, 50_304),
    "llama-1.3b": Case("llama-1.3b", 4, 2048, 32_000),
    "llama-3.1-8b": Case("llama-3.1-8b", 1, 8192, 128_256, tensor=2),
}


def loss_counts(case: Case, head_loss: Callable[..., torch.Tensor] | None = None) -> Counts:
    """Return what the loss of a micro-batch, or another version of `head_loss`, does forward and backward."""
    from btm_scale.model import loss

    rows, hidden = case.vocabulary // case.tensor, case.shape.hidden
    states = torch.empty(case.tokens, hidden, dtype=torch.bfloat16, device=META, requires_grad=True)
    weight = torch.empty(rows, hidden, dtype=torch.bfloat16, device=META, requires_grad=True)
    targets = torch.zeros(case.tokens, dtype=torch.int64, device=META)
    group: Any = None if case.tensor == 1 else object()
    with counted() as counts, _of_ranks(case.tensor):
        run = head_loss or loss.head_loss
        run(states, weight, targets, vocabulary=case.vocabulary, group=group).backward()
    return counts


def layer_counts(case: Case) -> Counts:
    """Return what one layer does besides what is around the layers, forward and backward."""
    few, more = (_model_counts(case, layers) for layers in (1, 2))
    return more.less(few)


def float8_layer_counts(case: Case) -> Counts:
    """Return the same of a layer whose products train in float8."""
    few, more = (_model_counts(case, layers, float8=True) for layers in (1, 2))
    return more.less(few)


def megatron_layer_counts(case: Case) -> Counts:
    """Return the same of a layer that uses Megatron-core's own fused functions only."""
    from btm_scale.model import gpt

    def unfused(*arguments: Any, **named: Any) -> Any:
        return specs(*arguments, **named | {"fused": False})

    specs = gpt._layer_spec
    with mock.patch.object(gpt, "_layer_spec", unfused):
        return layer_counts(case)


def _model_counts(case: Case, layers: int, *, float8: bool = False) -> Counts:
    from btm_scale.model import gpt

    shape = case.shape.model_copy(update={"layers": layers})
    model = _on_meta(gpt, shape, float8=float8)
    tokens = torch.zeros(case.sequences, case.length, dtype=torch.int64, device=META)
    model(tokens[:1, :8], tokens[:1, :8])  # caches cosines and sines
    with counted() as counts:
        model(tokens, tokens).backward()
    del model
    gc.collect()
    return counts


def _on_meta(gpt: Any, shape: ModelShape, *, float8: bool) -> Any:
    """Return the model that a GPU trains, on `meta`."""
    with mock.patch.object(gpt, "gpu", return_value=torch.device("cpu")):
        model = gpt.build_model(shape, tensor=1, dtype=torch.bfloat16, on_cpu=False, float8=float8, draws=False)
    return model.to_empty(device=META)


@contextlib.contextmanager
def _of_ranks(number: int) -> Iterator[None]:
    """Replace the collectives of a group, which move a few bytes per token, by nothing."""
    nothing = mock.patch.multiple(
        dist,
        get_world_size=lambda group=None: number,
        all_reduce=lambda *_, **__: None,
        all_gather_into_tensor=lambda *_, **__: None,
    )
    with nothing:
        yield
