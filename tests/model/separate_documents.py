"""Run documents packed into one sequence, and each separately: `python separate_documents.py SPEC.json`."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers.worlds import fork_world, read_spec
from safetensors.torch import save_file

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.gpt import build_model
from btm_scale.model.shape import ModelShape

END = 2


def rank(shape: ModelShape, recompute: str, file: str) -> None:
    group = ExpertGroup.join(Layout(precision="fp32"))
    group.seed(1)
    model = build_model(shape, tensor=1, dtype=torch.float32, on_cpu=True, recompute=recompute)  # type: ignore[arg-type]
    tokens = torch.randint(3, shape.vocabulary, (2, 12))
    tokens[0, 4] = tokens[1, 7] = END
    outputs = {"attended": model(tokens)}
    model.end_of_text = END
    outputs["packed"] = model(tokens)
    model.end_of_text = None
    alone = [
        torch.cat([model(row[None, :cut]), model(row[None, cut:])], dim=1)
        for row, cut in zip(tokens, (5, 8), strict=True)
    ]
    outputs["alone"] = torch.cat(alone)
    save_file({name: value.detach().contiguous() for name, value in outputs.items()}, Path(file))
    group.leave()


if __name__ == "__main__":
    spec = read_spec()
    for recompute, file in spec["files"].items():
        fork_world(1, rank, ModelShape.model_validate(spec["shape"]), recompute, file)
