"""Where a branch begins: at its parents' training states, with a share of the text that they learnt from."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from btm_scale.checkpoint.formats.open import open_model, with_head_names
from btm_scale.checkpoint.formats.safetensors import SafetensorsModel
from btm_scale.config.run import RunConfig
from btm_scale.data.tokenizer import Tokenizer
from btm_scale.distributed.group import ExpertGroup
from btm_scale.errors import CheckpointError, ConfigError
from btm_scale.forest.branch import parents_of
from btm_scale.forest.expert import Parent, read_expert
from btm_scale.model.gpt import ExpertModel
from btm_scale.model.hf_weights import huggingface_shapes, load_weights
from btm_scale.run_dir import RunDir
from btm_scale.train.checkpoint import Position, common_state, load_state, read_position, write_state
from btm_scale.train.engine import KINDS, MASTER, Engine
from btm_scale.train.jobs import TrainingJob
from btm_scale.util.files import write_file


@dataclass(frozen=True)
class Beginning:
    """What a branch begins with, settled once: a forest that changes later doesn't change it."""

    parents: tuple[Parent, ...]
    domains: dict[str, float]  # shares of the text, replayed text included


def beginning(config: RunConfig, run: RunDir, job: TrainingJob) -> Beginning:
    """A job's parents and text. The group's first rank settles and records it; all ranks call this together."""
    if dist.get_rank() == 0:
        settle(config, run, job)
    dist.barrier()
    return settle(config, run, job)


def settle(config: RunConfig, run: RunDir, job: TrainingJob) -> Beginning:
    """Work out a job's parents and text and record them, or read what was recorded."""
    path = run.train(job.model) / "branch.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(asdict(_settled(config, run, job)), indent=2) + "\n")
    values = json.loads(path.read_text())
    return Beginning(tuple(Parent(**parent) for parent in values["parents"]), values["domains"])


def begin_branch(engine: Engine, run: RunDir, job: TrainingJob, parents: tuple[Parent, ...]) -> None:
    """Put the engine at the weighted mean of the parents' training states, or of their weights alone."""
    assert job.branch is not None
    carried = job.branch.optimizer == "carried"
    states = {parent.name: common_state(run.checkpoints(parent.name)) for parent in parents}
    only = states[parents[0].name]
    if len(parents) == 1 and carried and only is not None:
        load_state(engine, only)
        return
    folder = run.train(job.model) / "first"
    if engine.group.is_first:
        _write_mean(engine, run, parents, states, carried, folder)
    dist.barrier()
    first = common_state(folder)
    assert first is not None
    load_state(engine, first)
    dist.barrier()
    if engine.group.is_first:
        shutil.rmtree(folder)


def _settled(config: RunConfig, run: RunDir, job: TrainingJob) -> Beginning:
    total = sum(job.weights.values())
    domains = {domain: weight / total for domain, weight in job.weights.items()}
    if job.branch is None:
        return Beginning((), domains)
    parents = parents_of(run, job.model, job.branch)
    replay = job.branch.replay
    if replay > 0:
        domains = {domain: share * (1.0 - replay) for domain, share in domains.items()}
        for parent in parents:
            for domain, share in _text_of(config, run, parent.name).items():
                domains[domain] = domains.get(domain, 0.0) + replay * parent.weight * share
    return Beginning(parents, domains)


def _text_of(config: RunConfig, run: RunDir, parent: str) -> dict[str, float]:
    """The shares of the domains that a parent learnt from last, of those that this run has text of."""
    shares = read_expert(run.model(parent)).domains
    known = {domain: share for domain, share in shares.items() if domain in config.expert_domains}
    if not known:
        raise CheckpointError(
            f"no text of '{parent}' can be replayed: it was trained on {', '.join(shares) or 'unknown text'}, which "
            "this run doesn't have; set branch.replay to 0"
        )
    total = sum(known.values())
    return {domain: share / total for domain, share in known.items()}


def _write_mean(
    engine: Engine,
    run: RunDir,
    parents: tuple[Parent, ...],
    states: dict[str, Path | None],
    carried: bool,
    folder: Path,
) -> None:
    shapes = huggingface_shapes(engine.model.shape)
    positions = [read_position(state) for state in states.values() if state is not None]
    # Moments are carried only where every parent has them; else they would be those of some.
    carried = carried and len(positions) == len(parents)
    sources = {parent.name: SafetensorsModel(states[parent.name] or run.model(parent.name)) for parent in parents}

    def mean(kind: str, name: str) -> torch.Tensor:
        total = torch.zeros(shapes[name], dtype=torch.float64)
        if kind != MASTER and not carried:
            return total.float()
        for parent in parents:
            key = name if states[parent.name] is None else f"{kind}/{name}"
            tensor = sources[parent.name].read(key)
            if tensor.shape != total.shape:
                raise CheckpointError(
                    f"{engine.job.model} cannot branch from {parent.name}: '{name}' is {tuple(tensor.shape)} there "
                    f"and {shapes[name]} in this run; only models of one shape can be averaged"
                )
            total.add_(tensor.double(), alpha=parent.weight)
        return total.float()

    steps = max((position.adam_steps for position in positions), default=0) if carried else 0
    loss_scale = positions[0].loss_scale if positions else {}
    tensors = ((f"{kind}/{name}", mean(kind, name)) for kind in KINDS for name in shapes)
    write_state(engine, folder, Position(0, steps, "", loss_scale), tensors)


def load_pretrained(group: ExpertGroup, model: ExpertModel, directory: Path, tokenizer: Tokenizer) -> None:
    """Set every weight of a model that no engine has wrapped yet.

    Raises ConfigError if the tokenizer has tokens that the model has no rows for.
    """
    if tokenizer.vocab_size > model.shape.vocabulary:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, {directory} is a model of {model.shape.vocabulary}; a "
            "pretrained model keeps its own tokenizer: leave `tokenizer` out"
        )
    with with_head_names(open_model(directory)) as weights:
        load_weights(model, weights.read, group.tensor_rank, group.layout.tensor)
