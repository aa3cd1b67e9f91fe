"""Measure the peak memory of a forward and backward pass: `measure_documents.py SPEC.json`.

The spec has `cases` (name: `length`, `documents`, `window`) and `result`, where the script writes the peak of each, in
bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers.allocations import allocations, memory_profiler
from helpers.worlds import fork_world, joined_anew, read_spec

from btm_scale.config.layout import Layout
from btm_scale.model.gpt import build_model
from btm_scale.model.shape import ModelShape

END, MEAN_LENGTH = 2, 500
SIZES = {"layers": 2, "hidden": 64, "heads": 2, "kv_heads": 1, "ffn": 128, "vocabulary": 128}


def peak(length: int, documents: bool, window: int | None) -> int:
    shape = ModelShape(family="mistral" if window else "llama", positions=length, window=window, **SIZES)
    model = build_model(shape, tensor=1, dtype=torch.float32, on_cpu=True)
    model.end_of_text = END if documents else None
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, shape.vocabulary, (1, length), generator=draw)
    tokens[torch.rand(1, length, generator=draw) < 1 / MEAN_LENGTH] = END
    model(tokens, tokens).backward()  # what PyTorch and the model keep for good
    model.zero_grad()
    with memory_profiler() as profiler:
        model(tokens, tokens).backward()
    return max(allocations(profiler))


def measure(spec: dict[str, Any]) -> None:
    group = joined_anew(None, Layout(precision="fp32"))
    Path(spec["result"]).write_text(json.dumps({name: peak(**case) for name, case in spec["cases"].items()}))
    group.leave()


if __name__ == "__main__":
    fork_world(1, measure, read_spec())
