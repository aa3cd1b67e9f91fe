"""The weights that training starts from: a pretrained model's, or the mean of an expert's parents."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from btm_scale.checkpoint.formats.open import open_model, with_head_names
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.checkpoint.formats.safetensors_writer import SINGLE
from btm_scale.checkpoint.merge.merge import merge_tensors
from btm_scale.config.run import RunConfig
from btm_scale.distributed.group import ExpertGroup
from btm_scale.distributed.patience import patient_group
from btm_scale.errors import CheckpointError, ForestError
from btm_scale.forest.branch import Branch, settle
from btm_scale.forest.expert import Parent, is_finished, read_expert
from btm_scale.model.gpt import ExpertModel
from btm_scale.model.hf_names import with_new_rows
from btm_scale.model.hf_weights import huggingface_shapes, load_weights
from btm_scale.run_dir import RunDir
from btm_scale.train.checkpoint import common_state, load_state, read_position, restore, state_shapes
from btm_scale.train.engine import KINDS, MASTER, Engine
from btm_scale.train.jobs import TrainingJob


def load_pretrained(group: ExpertGroup, model: ExpertModel, directory: Path) -> None:
    """Set every weight of a model that no engine has wrapped yet; tokens without a row get the mean of all rows."""
    with with_head_names(open_model(directory)) as weights:
        read = with_new_rows(weights.read, model.shape)
        load_weights(model, read, group.tensor_rank, group.layout.tensor)


def settled_branch(config: RunConfig, run: RunDir, job: TrainingJob) -> Branch:
    """Return a job's parents and training text, which the group's first rank records; all ranks call this together.

    It is broadcast, because a file that was just written may show up late on another host.
    """
    settled = [settle(config, run, job.model, job.branch, job.weights) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(settled, src=0)
    (branch,) = settled
    assert branch is not None
    return branch


def begin_branch(engine: Engine, run: RunDir, job: TrainingJob, parents: Sequence[Parent]) -> None:
    """Set the engine to the weighted mean of the parents' training checkpoints. All ranks call this together.

    A parent without a checkpoint, such as one that was added to the forest, contributes its exported weights.
    Moments are averaged only if every parent has them for all that is trained, and are zero otherwise or with a fresh
    optimizer.
    Raises ForestError if a parent is gone, CheckpointError if the parents' tensors differ in shape from the engine's.
    """
    assert job.branch is not None
    checkpoints = [_checkpoint(run, parent.name) for parent in parents]
    for parent, checkpoint in zip(parents, checkpoints, strict=True):
        if checkpoint is None and not is_finished(run.model(parent.name)):
            raise ForestError(
                f"{job.model} branches from '{parent.name}', which has neither a training checkpoint nor a finished "
                f"model in {run.root}. Parents must exist when training starts. Train it first, or choose others: "
                f"btm-scale branch {run.root} --name {job.model} --from ..."
            )
    positions = [read_position(checkpoint) for checkpoint in checkpoints if checkpoint is not None]
    moments = [checkpoint is not None and _has_moments(engine, checkpoint) for checkpoint in checkpoints]
    carried = job.branch.optimizer == "carried" and all(moments)
    if carried and len(parents) == 1 and checkpoints[0] is not None:
        load_state(engine, checkpoints[0])
        return
    engine.adam_steps = max(position.adam_steps for position in positions) if carried else 0
    engine.loss_scale = positions[0].loss_scale if positions else {}
    sources = [checkpoint or run.model(parent.name) for parent, checkpoint in zip(parents, checkpoints, strict=True)]
    if len(parents) == 1:
        _load(engine, sources[0], (MASTER,), prefixed=checkpoints[0] is not None)
        return
    mean = run.train(job.model) / "first"
    # A merge of large models takes longer than a collective of training may wait.
    merge_group = patient_group()
    if engine.group.is_first:
        weights = [parent.weight for parent in parents]
        names = list(state_shapes(engine) if carried else huggingface_shapes(engine.model.shape))
        _write_mean(mean, list(zip(sources, weights, strict=True)), names, carried)
    dist.barrier(merge_group)
    _load(engine, mean, KINDS if carried else (MASTER,), prefixed=carried)
    dist.barrier(merge_group)
    if engine.group.is_first:
        shutil.rmtree(mean)


def _checkpoint(run: RunDir, parent: str) -> Path | None:
    """Return the checkpoint whose weights a parent has: the newest, or the best if that was exported."""
    best: list[int] = [0]
    if dist.get_rank() == 0 and is_finished(run.model(parent)):
        best = [read_expert(run.model(parent)).best_step]
    dist.broadcast_object_list(best, src=0)
    return common_state(run.checkpoints(parent), only=best[0] or None)


def _has_moments(engine: Engine, checkpoint: Path) -> bool:
    """Return whether a checkpoint has the moments of all that the engine trains; a parent may have frozen a part."""
    with SafetensorsModel(checkpoint) as tensors:
        return tensors.specs().keys() >= state_shapes(engine).keys()


def _write_mean(output: Path, inputs: Sequence[tuple[Path, float]], names: Sequence[str], carried: bool) -> None:
    """Write the float32 mean of models' tensors, or of those of checkpoints if moments are `carried`."""
    shutil.rmtree(output, ignore_errors=True)
    if carried:
        # A checkpoint opens as a model with master weights alone; its file has the moments too.
        inputs = [(checkpoint / SINGLE, weight) for checkpoint, weight in inputs]
    merge_tensors(output, inputs, names, dtype="float32")


def _load(engine: Engine, path: Path, kinds: Sequence[str], *, prefixed: bool) -> None:
    """Set the engine from a folder whose tensors have Hugging Face names, `prefixed` with their kind or not."""

    def key(kind: str, name: str) -> str:
        return f"{kind}/{name}" if prefixed else name

    with SafetensorsModel(path) as tensors:
        shapes = {name: spec.shape for name, spec in tensors.specs().items()}
        for stored, shape in state_shapes(engine, kinds).items():
            kind, _, name = stored.partition("/")
            if shapes.get(key(kind, name)) != shape:
                raise CheckpointError(
                    f"{engine.job.model} cannot branch from {path}: '{name}' is {shapes.get(key(kind, name))} there "
                    f"and {shape} in this model. Only models of one shape can be branched from or averaged. Choose "
                    "other parents."
                )

        def read(kind: str, name: str) -> Tensor:
            return tensors.read(key(kind, name))

        restore(engine, read, kinds)
