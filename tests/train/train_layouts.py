"""Train one tiny model in several layouts with the same number of ranks: `train_layouts.py SPEC.json`.

Started by a launcher, it is one rank; otherwise it forks the ranks of each spec in a list. A spec has `layouts`
(name: layout), `shape`, `steps`, `sequences` and `folder`; also `optimizer`, `deepspeed` and `mixture` settings, the
part that it `trains`, the fraction of targets that are parts of `answers`, the token that is `end_of_text` of separate
documents, the folder of a `pretrained` model to begin with, whether float8 products are `rounded_to_bfloat16` instead,
`begin` (by layout, the name of the layout whose checkpoint to resume from) and `save` (the step at which to save a
checkpoint and stop; or by layout, also of those that resume).
For each layout, the first rank writes `FOLDER/NAME.safetensors` with `losses` and the weights under their Hugging Face
names; with `gradients`, also the first moments after the first step, which are a multiple of its gradients, under
`exp_avg/NAME`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers.small_models import learnable_text
from helpers.worlds import fork_world, joined_anew, read_spec
from safetensors.torch import save_file

from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.config.layout import Layout
from btm_scale.config.moe import MoeTrainConfig
from btm_scale.config.training import OptimizerConfig
from btm_scale.data.chat.packing import START, UNTRAINED
from btm_scale.distributed.group import ExpertGroup
from btm_scale.model import float8
from btm_scale.model.hf_weights import huggingface_tensors
from btm_scale.model.shape import ModelShape
from btm_scale.model.trained import freeze_rest, frozen_names
from btm_scale.train.build import new_model
from btm_scale.train.checkpoint import common_state, load_state, save_state, state_path
from btm_scale.train.engine import FIRST_MOMENT, MASTER, Engine
from btm_scale.train.jobs import TrainingJob
from btm_scale.train.start import load_pretrained


def make_engine(group: ExpertGroup, spec: dict[str, Any]) -> Engine:
    shape = ModelShape.model_validate(spec["shape"])
    layout = group.layout
    assert not layout.problems(shape, shape.positions)
    job = TrainingJob(
        model="tiny",
        branch=None,
        weights={},
        part=None,
        steps=spec["steps"],
        sequences=spec["sequences"],
        batch_share=1.0,
        first_sample=0,
        samples=spec["sequences"],
        progress=(0.0, 1.0),
        layout=layout,
        trains=spec.get("trains", "all"),
        mixture=MoeTrainConfig(**spec["mixture"]) if "mixture" in spec else None,
    )
    group.seed(1)
    optimizer, overrides = OptimizerConfig(**spec.get("optimizer", {})), spec.get("deepspeed", {})
    model = new_model(group, shape, job, optimizer, overrides)
    model.end_of_text = spec.get("end_of_text")
    if "pretrained" in spec:
        load_pretrained(group, model, Path(spec["pretrained"]))
    freeze_rest(model, job.trains)
    return Engine(group, model, job, optimizer, overrides)


def batch(group: ExpertGroup, engine: Engine, step: int, answers: float | None = None) -> torch.Tensor:
    """This data rank's part of the batch of a step."""
    shape = engine.model.shape
    sequences = learnable_text(step, engine.job.sequences, shape.positions, shape.vocabulary)
    if answers is not None:
        sequences[:, 0] |= START
        generator = torch.Generator().manual_seed(step)
        left_out = torch.rand(sequences.shape, generator=generator) >= answers
        left_out[::3] = answers < 1  # in these, nothing is trained on
        sequences |= UNTRAINED * left_out
    return sequences.chunk(group.layout.data)[group.data_rank]


def train(engine: Engine, first: int, last: int, answers: float | None = None) -> list[float]:
    losses = []
    for step in range(first, last + 1):
        losses.append(engine.step(batch(engine.group, engine, step, answers), 2e-3).loss)
        if engine.is_whole_after(step):
            engine.outer_step()
    return losses


def count_bytes() -> list[int]:
    """Count the bytes that this rank passes to collectives from now on; the list's only number grows."""
    sent = [0]

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            given = (*arguments, *named.values())
            group = next((value for value in given if isinstance(value, dist.ProcessGroup)), None)
            if dist.get_world_size(group) > 1:
                sent[0] += max(value.nbytes for value in given if torch.is_tensor(value))
            return collective(*arguments, **named)

        return call

    for name in (
        "all_reduce",
        "reduce",
        "broadcast",
        "all_gather_into_tensor",
        "reduce_scatter_tensor",
        "all_to_all_single",
    ):
        setattr(dist, name, counted(getattr(dist, name)))
    return sent


def weights(engine: Engine, kind: str = MASTER) -> dict[str, torch.Tensor]:
    parameters = engine.parameters
    tensors = huggingface_tensors(
        engine.model.shape,
        lambda entry: engine.full(parameters[entry.megatron], kind),
        engine.group.tensor_group,
    )
    return {name: tensor.clone() for name, tensor in tensors}


def require_complete(engine: Engine, folder: Path) -> None:
    """Check that the checkpoint is intact, and has the bits of the state that the ranks gather from each other."""
    path = common_state(folder)
    assert path is not None
    frozen = frozen_names(engine.model.shape, engine.job.trains)
    expected = {
        f"{kind}/{name}": tensor
        for kind in engine.kinds
        for name, tensor in weights(engine, kind).items()
        if kind == MASTER or name not in frozen
    }
    with SafetensorsModel(path) as saved:
        assert set(saved.names) == set(expected)
        assert all(torch.equal(saved.read(name), tensor) for name, tensor in expected.items())


def train_all(spec: dict[str, Any]) -> None:
    group: ExpertGroup | None = None
    if spec.get("rounded_to_bfloat16"):
        float8.product = lambda left, right: torch.mm(left, right.t())
    sent = count_bytes()
    for name, values in spec["layouts"].items():
        config = Layout.model_validate(values)
        group = joined_anew(group, config)
        engine = make_engine(group, spec)
        folder, first, last = Path(spec["folder"]), 1, spec["steps"]
        save, origin = spec.get("save", {}), spec.get("begin", {}).get(name)
        if origin is not None:
            saved = save[origin] if isinstance(save, dict) else save
            first = load_state(engine, state_path(folder / origin, saved)).step + 1
        if isinstance(save, dict):
            last = save.get(name, last)
        elif origin is None:
            last = save
        before = sent[0]
        losses = []
        moments = {}
        if spec.get("gradients"):
            losses = train(engine, first, first, spec.get("answers"))
            moments = {f"{FIRST_MOMENT}/{key}": moment for key, moment in weights(engine, FIRST_MOMENT).items()}
        losses += train(engine, first + len(losses), last, spec.get("answers"))
        if last < spec["steps"]:
            sent_before = sent[0]
            save_state(engine, folder / name, last, keep=1)
            assert sent[0] == sent_before, "saving gathered a tensor"
            require_complete(engine, folder / name)
        tensors = weights(engine) | moments | {"losses": torch.tensor(losses, dtype=torch.float64)}
        tensors["bytes"] = torch.tensor(sent[0] - before)
        if group.is_first:
            save_file(tensors, folder / f"{name}.safetensors")
        engine.close()
    assert group is not None
    group.leave()


def ranks_of(spec: dict[str, Any]) -> int:
    layout = next(iter(spec["layouts"].values()))
    return Layout.model_validate(layout).ranks


if __name__ == "__main__":
    if "RANK" in os.environ:
        train_all(read_spec())
    else:
        for part in read_spec():
            fork_world(ranks_of(part), train_all, part)
