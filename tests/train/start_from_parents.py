"""Save checkpoints of a few tiny models and branch from them: `start_from_parents.py SPEC.json`, two tensor ranks.

A spec has `root` (a run's folder), `shape`, `parents` (name: training steps), `branches` (name: `parents` with weights
and `optimizer`) and `trains` (name: the trained part, if not all). Each parent writes a training checkpoint. Each
branch writes `ROOT/NAME.safetensors` with the full training state of its engine, or `ROOT/NAME.txt` with the error.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from helpers.worlds import fork_world, read_spec
from safetensors.torch import save_file
from train_layouts import make_engine, train

from btm_scale.config.layout import Layout
from btm_scale.config.training import BranchConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.errors import UserError
from btm_scale.forest.expert import Parent
from btm_scale.model.hf_weights import huggingface_tensors
from btm_scale.run_dir import RunDir
from btm_scale.train.checkpoint import save_state
from btm_scale.train.engine import KINDS, Engine
from btm_scale.train.start import begin_branch


def full_state(engine: Engine) -> dict[str, torch.Tensor]:
    parameters, state = engine.parameters, {}
    for kind in KINDS:
        tensors = huggingface_tensors(
            engine.model.shape,
            lambda entry, kind=kind: engine.full(parameters[entry.megatron], kind),
            engine.group.tensor_group,
        )
        state |= {f"{kind}/{name}": tensor.clone() for name, tensor in tensors}
    return state


def branch_all(spec: dict[str, Any]) -> None:
    run = RunDir(Path(spec["root"]))
    group = ExpertGroup.join(Layout.model_validate({"tensor": 2, "precision": "fp32", "micro_batch": 2}))
    values = {"shape": spec["shape"], "steps": 10, "sequences": 2}
    for number, (name, steps) in enumerate(spec["parents"].items()):
        engine = make_engine(group, values | {"trains": spec["trains"].get(name, "all")})
        train(engine, 100 * number + 1, 100 * number + steps)
        save_state(engine, run.checkpoints(name), steps, keep=1)
        engine.close()
    for name, branch in spec["branches"].items():
        engine = make_engine(group, values | {"trains": spec["trains"].get(name, "all")})
        config = BranchConfig(parents=branch["parents"], optimizer=branch["optimizer"])
        job = replace(engine.job, model=name, branch=config)
        try:
            begin_branch(engine, run, job, [Parent(*parent) for parent in branch["parents"].items()])
        except UserError as error:
            (run.root / f"{name}.txt").write_text(str(error))
        else:
            state = full_state(engine) | {"adam_steps": torch.tensor(engine.adam_steps)}
            if group.is_first:
                save_file(state, run.root / f"{name}.safetensors")
        engine.close()
    group.leave()


if __name__ == "__main__":
    fork_world(2, branch_all, read_spec())
