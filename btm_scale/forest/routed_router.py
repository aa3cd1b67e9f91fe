"""The router `fitted-routed`: rows in closed form, fitted layer by layer to the mixture as it routes so far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from btm_scale.data.eval_text import EvaluationText
from btm_scale.errors import ForestError
from btm_scale.forest.observed_inputs import batches
from btm_scale.forest.router import fitted, gate_names, one_blas_thread
from btm_scale.model.hf_load import load_causal_lm
from btm_scale.model.shape import ModelShape


class _ReachedError(Exception):
    """A layer has its input, and no later layer is needed."""


@torch.no_grad()
def fitted_routed(
    directory: Path, shape: ModelShape, texts: Sequence[Sequence[EvaluationText]], device: str
) -> dict[str, np.ndarray]:
    """Return the gate of every layer under its Hugging Face name: float32 [experts, hidden].

    `directory` is the mixture with any router; `texts` are those of each expert's domains, in the order of the experts.
    Unlike those of `fitted`, the sums that a row is made of depend on all experts. Raises ForestError as `fitted` does,
    and if hidden states are not numbers, although the weights are.
    """
    model = load_causal_lm(directory).to(device).eval()
    gates = {}
    for name, layer in zip(gate_names(shape), model.model.layers, strict=True):
        means, seconds = zip(*(_moments(model, layer, own, device) for own in texts), strict=True)
        if not all(second.isfinite().all() for second in seconds):
            raise ForestError(
                f"The hidden states of the mixture before {name} are not numbers, although the experts' weights are: "
                "they overflow in its dtype. Use --router random, or leave out an expert: --without NAME"
            )
        with one_blas_thread():
            rows = fitted(torch.stack(means).numpy(), (sum(seconds[1:], seconds[0]) / len(seconds)).numpy())
        layer.mlp.gate.weight.copy_(torch.from_numpy(rows))
        gates[name] = rows.astype("<f4")
    return gates


def _moments(model: Any, layer: Any, texts: Sequence[EvaluationText], device: str) -> tuple[Tensor, Tensor]:
    """Return the mean and the second moment of the inputs of a layer's MLP."""
    size, count = layer.mlp.gate.weight.shape[1], 0
    total = torch.zeros(size, dtype=torch.float64, device=device)
    second = torch.zeros(size, size, dtype=torch.float64, device=device)

    def observe(_: Any, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0].reshape(-1, size).double()
        total.add_(hidden.sum(dim=0))
        second.add_(hidden.t() @ hidden)
        raise _ReachedError

    hook = layer.mlp.register_forward_pre_hook(observe)
    try:
        for batch in batches(texts):
            try:
                model.model(input_ids=batch.to(device), use_cache=False)
            except _ReachedError:
                count += batch.numel()
    finally:
        hook.remove()
    return (total / count).cpu(), (second / count).cpu()
