"""The inputs of every MLP of a model while it reads text, which routers are fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from btm_scale.data.eval_text import EvaluationText
from btm_scale.errors import ForestError
from btm_scale.forest.posterior.mixture import blocks_of
from btm_scale.model.hf_load import load_causal_lm

_BATCH_TOKENS = 4096


@torch.no_grad()
def observed_means(directory: Path, name: str, texts: Sequence[EvaluationText], device: str) -> dict[str, Tensor]:
    """Return the tensors of `RouterSums` of the model `name` in `directory`, on texts.

    Raises ForestError if its hidden states are not numbers.
    """
    model = load_causal_lm(directory).to(device).eval()
    sums: dict[str, Tensor] = {}
    count = 0
    with _observed(model, sums):
        for batch in batches(texts):
            model.model(input_ids=batch.to(device), use_cache=False)
            count += batch.numel()
    means = {key: (total / count).cpu() for key, total in sums.items()}
    if not all(tensor.isfinite().all() for tensor in means.values()):
        raise ForestError(
            f"The hidden states of '{name}' are not numbers. Its weights have NaN or infinities. Check how they were "
            f"trained, or leave it out: --without {name}"
        )
    return means | {"count": torch.tensor([count])}


@contextmanager
def _observed(model: Any, sums: dict[str, Tensor]) -> Iterator[None]:
    """Add up the inputs of every MLP, and the embeddings, of what the model reads meanwhile."""

    def add(key: str, term: Tensor) -> None:
        sums[key] = sums[key] + term if key in sums else term

    def observe(number: int, _: Any, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
        add(f"layers.{number}.mean", hidden.sum(dim=0))
        add(f"layers.{number}.second", hidden.t() @ hidden)

    def embed(_: Any, __: Any, output: Tensor) -> None:
        add("embedding", output.reshape(-1, output.shape[-1]).double().sum(dim=0))

    hooks = [layer.mlp.register_forward_pre_hook(partial(observe, i)) for i, layer in enumerate(model.model.layers)]
    hooks.append(model.model.embed_tokens.register_forward_hook(embed))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def batches(texts: Sequence[EvaluationText]) -> Iterator[Tensor]:
    """Yield the blocks of texts, several of one length at a time: int64 [blocks, length]."""
    for text in texts:
        tokens, waiting = torch.as_tensor(text.tokens), list[Tensor]()
        for begin, end in blocks_of(text.block_starts, len(text.targets)):
            block = tokens[begin:end]
            if waiting and (len(block) != len(waiting[0]) or (len(waiting) + 1) * len(block) > _BATCH_TOKENS):
                yield torch.stack(waiting)
                waiting = []
            waiting.append(block)
        yield torch.stack(waiting)
