"""What a router is fitted to: sums over the inputs of every MLP of an expert, on its own domains' dev text.

An expert's sums do not depend on any other expert. They are kept, so leaving an expert out of a mixture or adding it
again reads no text, and gives the bits that a forest without it would give.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from btm_scale.config.run import RunConfig
from btm_scale.data.eval_text import EvaluationText
from btm_scale.errors import ForestError
from btm_scale.forest.expert import read_expert
from btm_scale.forest.posterior.mixture import blocks_of
from btm_scale.forest.routers import texts_of_expert
from btm_scale.forest.scores import with_sorted_header
from btm_scale.model.hf_load import load_causal_lm
from btm_scale.run_dir import RunDir
from btm_scale.util.files import make_directory, write_file

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class LayerSums:
    """The inputs of one layer's MLP: mean [hidden] and second moment [hidden, hidden], float64."""

    mean: Tensor
    second: Tensor


class RouterSums:
    """The sums of one expert on disk, read layer by layer."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def layer(self, number: int) -> LayerSums:
        """Return the means of one layer."""
        return LayerSums(self._read(f"layers.{number}.mean"), self._read(f"layers.{number}.second"))

    @property
    def embedding(self) -> Tensor:
        """The mean embedding of the tokens: float64 [hidden]."""
        return self._read("embedding")

    def _read(self, name: str) -> Tensor:
        with safe_open(self.path, "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def router_sums(config: RunConfig, run: RunDir, name: str, *, device: str = "cpu") -> RouterSums:
    """Return the sums of an expert, which are computed first if there are none of its weights and text.

    Raises ForestError for an expert without a domain, or whose hidden states are not numbers.
    """
    texts = texts_of_expert(config, run, name)
    of = {
        "model": read_expert(run.model(name)).content_hash,
        "texts": json.dumps({text.domain: text.fingerprint for text in texts}),
    }
    path = run.router(name)
    if _metadata(path) != of:
        tensors = _compute(run, name, texts, device)
        make_directory(path.parent)
        write_file(path, with_sorted_header(save(tensors, of)))
    return RouterSums(path)


def _metadata(path: Path) -> dict[str, str] | None:
    """Return what the sums in a file are of, or None if they are missing or damaged."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError):
        return None


@torch.no_grad()
def _compute(run: RunDir, name: str, texts: Sequence[EvaluationText], device: str) -> dict[str, Tensor]:
    model = load_causal_lm(run.model(name)).to(device).eval()
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
