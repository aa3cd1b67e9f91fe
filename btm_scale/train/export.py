"""Export a trained model as an expert: a Hugging Face directory that is published together with its card."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch.distributed as dist

from btm_scale.checkpoint.formats.safetensors_writer import ShardedWriter
from btm_scale.checkpoint.formats.tensors import TensorSpec, dtype_name
from btm_scale.checkpoint.hashing import hash_and_keep
from btm_scale.config.run import RunConfig
from btm_scale.data.fingerprint import Fingerprint
from btm_scale.forest.branch import Branch
from btm_scale.forest.expert import CARD, Expert, read_expert
from btm_scale.forest.turns import scoring
from btm_scale.model.hf_config import config_json, read_config
from btm_scale.model.hf_weights import huggingface_shapes, huggingface_tensors
from btm_scale.run_dir import RunDir
from btm_scale.train.engine import Engine
from btm_scale.train.jobs import TrainingJob
from btm_scale.util.device_query import name_of
from btm_scale.util.disk_errors import writing
from btm_scale.util.files import make_partial, partial_path, publish_directory, remove_partial
from btm_scale.util.inside import copy_inside


def export_expert(
    engine: Engine,
    config: RunConfig,
    run: RunDir,
    branch: Branch,
    end_of_text: int,
    steps: int,
    best: int | None = None,
    first: Path | None = None,
) -> None:
    """Write the trained model, in the dtype it computes in, to its folder in the run. All ranks call this together.

    Args: `steps`, that were taken; `best`, the step whose weights the engine has, if that is not the last; `first`, the
    directory of the model from which a mixture of experts was trained.
    """
    final = run.model(engine.job.model)
    try:
        with writing(final):
            _export(engine, config, run, branch, end_of_text, steps, best, first)
    except OSError:
        if engine.group.is_first:
            remove_partial(partial_path(final))  # it would take the space that the next attempt needs
        raise
    dist.barrier()


def _export(
    engine: Engine,
    config: RunConfig,
    run: RunDir,
    branch: Branch,
    end_of_text: int,
    steps: int,
    best: int | None,
    first: Path | None,
) -> None:
    group, shape, job = engine.group, engine.model.shape, engine.job
    final = run.model(job.model)
    partial = partial_path(final)
    writer = None
    if group.is_first:
        make_partial(partial)
        specs = {name: TensorSpec(group.dtype, size) for name, size in huggingface_shapes(shape).items()}
        writer = ShardedWriter(partial, specs)
    parameters = engine.parameters
    tensors = huggingface_tensors(shape, lambda entry: engine.weights(parameters[entry.megatron]), group.tensor_group)
    for name, tensor in tensors:
        if writer is not None:
            writer.write(name, tensor)
    if writer is not None:
        writer.close()
        settings = config_json(shape, dtype=dtype_name(group.dtype), end_of_text=end_of_text)
        if first is not None:  # its experts' names, and special tokens
            settings = read_config(first) | {"torch_dtype": settings["torch_dtype"]}
        (partial / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        for file in sorted(run.tokenizer.iterdir()):
            copy_inside(run.tokenizer, file.name, partial)
        card = _card(config, run, job, branch, partial, steps)
        if first is not None:
            source = read_expert(first)
            recorded = {"parents": source.parents, "data_fingerprint": source.data_fingerprint}
            card = card.model_copy(update=recorded | {"layout": source.layout | card.layout})
        card = card.model_copy(update={"device": name_of(group.device), "best_step": best or 0})
        card.write(partial / CARD)
        # A raised budget replaces the expert of the smaller one, and not while the forest is evaluated.
        replaces = bool(job.earlier) or first is not None
        with scoring(run) if replaces else contextlib.nullcontext():
            publish_directory(partial, final, replace=replaces)


def _card(config: RunConfig, run: RunDir, job: TrainingJob, branch: Branch, directory: Path, steps: int) -> Expert:
    return Expert(
        name=job.model,
        domains=branch.domains,
        parents=branch.parents,
        tokens=steps * job.sequences * config.budget.sequence_length,
        steps=steps,
        layout=job.layout.model_dump(),
        data_fingerprint={domain: Fingerprint.of_domain(run, domain).text for domain in branch.domains},
        content_hash=hash_and_keep(directory),
        trains=job.trains,
        parent_hashes=branch.parent_hashes,
    )
