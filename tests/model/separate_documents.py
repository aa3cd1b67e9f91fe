"""Compute losses and gradients of packed documents, and of each document alone: `separate_documents.py SPEC.json`.

The spec has `cases` (name: `shape`, `recompute`, `tensor`, `restart`) and `result`. For each case the script writes
the largest difference of the `loss`, and of a `gradient` relative to its tensor's largest number; `crossed` is the
difference of the loss if documents attend to each other.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from helpers.worlds import fork_world, joined_anew, read_spec

from btm_scale.config.layout import Layout
from btm_scale.model.gpt import ExpertModel, build_model
from btm_scale.model.shape import ModelShape

END = 2
CUTS = ((0, 6, 8, 24), (0, 2, 16, 24))  # even, so that tensor ranks divide a document between them


def with_gradients(model: ExpertModel, loss: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss.backward()
    gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    return loss.detach(), gradients


def difference(case: dict[str, Any]) -> dict[str, float]:
    shape = ModelShape.model_validate(case["shape"])
    torch.manual_seed(1)
    model = build_model(
        shape,
        tensor=case["tensor"],
        dtype=torch.float32,
        on_cpu=True,
        recompute=case["recompute"],
        sequence_parallel=case["tensor"] > 1,
    )
    length = CUTS[0][-1]
    tokens = torch.randint(3, shape.vocabulary, (len(CUTS), length + 1), generator=torch.Generator().manual_seed(2))
    for row, cuts in zip(tokens, CUTS, strict=True):
        row[[cut - 1 for cut in cuts[1:-1]]] = END
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    crossed = model(inputs, targets).detach()
    model.end_of_text, model.restarts_positions = END, case["restart"]
    loss, gradients = with_gradients(model, model(inputs, targets))
    model.end_of_text = None
    alone = [
        model(inputs[row, None, begin:end], targets[row, None, begin:end]) * (end - begin) / targets.numel()
        for row, cuts in enumerate(CUTS)
        for begin, end in pairwise(cuts)
    ]
    expected, exact = with_gradients(model, torch.stack(alone).sum())
    assert gradients.keys() == exact.keys()
    worst = max(float((gradients[name] - exact[name]).abs().max() / exact[name].abs().max()) for name in exact)
    return {
        "loss": float((loss - expected).abs()),
        "gradient": worst,
        "crossed": float((crossed - expected).abs()),
    }


def rank(tensor: int, spec: dict[str, Any]) -> None:
    group = joined_anew(None, Layout(tensor=tensor, precision="fp32"))
    results = {name: difference(case) for name, case in spec["cases"].items() if case["tensor"] == tensor}
    if group.is_first:
        Path(spec["result"]).with_suffix(f".{tensor}").write_text(json.dumps(results))
    group.leave()


if __name__ == "__main__":
    spec = read_spec()
    for tensor in sorted({case["tensor"] for case in spec["cases"].values()}):
        fork_world(tensor, rank, tensor, spec)
