"""Train the MLPs of a model alone, in several layouts with two ranks: `train_mlps.py SPEC.json`.

A spec has `layouts` (name: layout), `shape`, `steps`, `sequences` and `folder`. For each layout, the first rank writes
`FOLDER/NAME.safetensors` with the parent's weights, those of its MLP-only expert, and those of an expert that was
interrupted, in the dtype they are computed in, prefixed with `parent/`, `expert/` and `resumed/`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers.worlds import fork_world, joined_anew, read_spec
from safetensors.torch import save_file
from train_layouts import make_engine, require_complete, train

from btm_scale.config.layout import Layout
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model.hf_weights import huggingface_tensors
from btm_scale.train.checkpoint import load_state, save_state, state_path
from btm_scale.train.engine import Engine


def computed(engine: Engine) -> dict[str, torch.Tensor]:
    """The weights as the model computes with them, which are exported."""
    parameters = engine.parameters
    tensors = huggingface_tensors(
        engine.model.shape, lambda entry: engine.weights(parameters[entry.megatron]), engine.group.tensor_group
    )
    return {name: tensor.clone() for name, tensor in tensors}


def train_part(group: ExpertGroup, spec: dict[str, Any], name: str) -> None:
    folder = Path(spec["folder"])
    half, last = spec["steps"] // 2, spec["steps"]
    result = {}

    def keep(kind: str, engine: Engine) -> None:
        result.update({f"{kind}/{name}": tensor for name, tensor in computed(engine).items()})
        engine.close()

    parent = make_engine(group, spec)
    train(parent, 1, half)
    save_state(parent, folder / name / "parent", half, keep=1)
    keep("parent", parent)

    part = spec | {"trains": "mlp"}
    expert = make_engine(group, part)
    load_state(expert, state_path(folder / name / "parent", half))
    train(expert, half + 1, last)
    save_state(expert, folder / name / "expert", last, keep=1)
    require_complete(expert, folder / name / "expert")
    train(expert, last + 1, last + half)
    keep("expert", expert)

    resumed = make_engine(group, part)
    assert load_state(resumed, state_path(folder / name / "expert", last)).step == last
    train(resumed, last + 1, last + half)
    keep("resumed", resumed)
    if group.is_first:
        save_file(result, folder / f"{name}.safetensors")


def train_all(spec: dict[str, Any]) -> None:
    group: ExpertGroup | None = None
    for name, values in spec["layouts"].items():
        group = joined_anew(group, Layout.model_validate(values))
        train_part(group, spec, name)
    assert group is not None
    group.leave()


if __name__ == "__main__":
    fork_world(2, train_all, read_spec())
