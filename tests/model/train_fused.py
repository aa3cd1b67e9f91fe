"""Compute losses and gradients of models with the layers for a GPU and with those for a CPU, both on the CPU.

`train_fused.py SPEC.json`: the spec has `cases` (name: `family`, `recompute`, `documents`, `tensor`, `releases`) and
`result`. For each case the script writes the largest difference of the `loss`, and of a `gradient` relative to its
tensor's largest number, `same_mlp`, whether the layers for a CPU compute the bits of Megatron-core's own MLPs, and
`drawn`, the largest number in a matrix of the same model built without `draws`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from helpers.worlds import fork_world, joined_anew, read_spec

from btm_scale.config.layout import Layout
from btm_scale.model import gpt
from btm_scale.model.families import FAMILIES
from btm_scale.model.fused_layer import FusedLayer
from btm_scale.model.shape import ModelShape

BATCH, LENGTH, VOCABULARY = 2, 24, 131


def shape_of(family: str) -> ModelShape:
    traits = FAMILIES[family]
    sizes = {"layers": 2, "hidden": 48, "heads": 4, "kv_heads": 2 if traits.grouped else 4, "ffn": 56}
    window = {"window": 9} if traits.windowed else {}
    return ModelShape(family=family, positions=LENGTH, vocabulary=VOCABULARY, **sizes, **window)


def model_of(case: dict[str, Any], *, fused: bool, draws: bool = True) -> gpt.ExpertModel:
    """Return a model whose vectors differ from their first values."""
    torch.manual_seed(0)
    with mock.patch.object(gpt, "gpu", return_value=torch.device("cpu")):
        model = gpt.build_model(
            shape_of(case["family"]),
            tensor=case["tensor"],
            dtype=torch.float32,
            on_cpu=not fused,
            recompute=case["recompute"],
            sequence_parallel=case["tensor"] > 1,
            releases_weights=case["releases"],
            draws=draws,
        )
    model.end_of_text = 2 if case["documents"] else None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    assert isinstance(model.decoder.layers[0], FusedLayer) == fused
    return model


def computed(
    case: dict[str, Any], *, fused: bool, megatron_mlp: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model = model_of(case, fused=fused)
    if megatron_mlp:
        for layer in model.decoder.layers:
            assert ("forward" in vars(layer.mlp)) == model.config.gated_linear_unit
            vars(layer.mlp).pop("forward", None)
    tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    loss = model(tokens[:, :-1], tokens[:, 1:])
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}  # type: ignore[misc]


def difference(case: dict[str, Any]) -> dict[str, Any]:
    (loss, gradients), (expected, exact) = (computed(case, fused=fused) for fused in (True, False))
    assert gradients.keys() == exact.keys()
    worst = max(
        float((gradients[name] - exact[name]).abs().max() / exact[name].abs().max().clamp(min=1e-4)) for name in exact
    )
    distance = abs(float(loss - expected))
    same_mlp = case["recompute"] == "tiled"  # whose MLPs would no longer be tiled
    if not same_mlp:
        loss, gradients = computed(case, fused=False, megatron_mlp=True)
        same_mlp = torch.equal(loss, expected) and all(torch.equal(gradients[name], exact[name]) for name in exact)
    matrices = [one for one in model_of(case, fused=True, draws=False).parameters() if one.ndim > 1]
    drawn = max(float(one.detach().abs().max()) for one in matrices)
    return {"loss": distance, "gradient": worst, "same_mlp": same_mlp, "drawn": drawn}


def rank(tensor: int, spec: dict[str, Any]) -> None:
    group = joined_anew(None, Layout(tensor=tensor, precision="fp32"))
    cases = {name: case for name, case in spec["cases"].items() if case["tensor"] == tensor}
    results = {name: difference(case) for name, case in cases.items()}
    if group.is_first:
        Path(spec["result"]).with_suffix(f".{tensor}").write_text(json.dumps(results))
    group.leave()


if __name__ == "__main__":
    spec = read_spec()
    for tensor in sorted({case["tensor"] for case in spec["cases"].values()}):
        fork_world(tensor, rank, tensor, spec)
