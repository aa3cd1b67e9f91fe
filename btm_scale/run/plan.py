"""`btm-scale plan`: estimate memory, time and placement of a run on a given cluster."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from btm_scale.config.layout import Layout
from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError, LaunchError
from btm_scale.launch.plan import (
    Cluster,
    GroupPlan,
    StagePlan,
    Training,
    data_parallel_bytes,
    longest_sequence,
    plan_group,
    plan_stage,
    propose,
)
from btm_scale.model.shape import ModelShape
from btm_scale.run_dir import SEED
from btm_scale.train.jobs import TrainingJob, model_names, shape_of, training_job, training_stages
from btm_scale.util.bounded_json import shown
from btm_scale.util.records import read_object

_LAYOUT = ("tensor", "context", "data", "zero", "sequence_parallel", "recompute")


def make_plan(config: RunConfig, cluster: Cluster) -> dict[str, Any]:
    """Return memory, time and placement of every group, stage by stage; layouts that the YAML omits are proposed."""
    vocabulary = vocabulary_of(config)
    shape = config.model.shape(vocabulary, config.budget.sequence_length)
    config, proposed = with_proposals(config, shape, cluster)
    config = config.with_precision(cluster.gpu.half)
    jobs = {name: training_job(config, name) for name in model_names(config)}
    if not cluster.gpu.float8 and any(job.layout.float8 for job in jobs.values()):
        raise LaunchError(
            f"Cannot train in float8 on {cluster.gpu.name}. NVIDIA GPUs support it from compute capability 8.9: choose "
            "another GPU, or set layout.float8 to false."
        )
    stages = []
    for names in training_stages(config):
        # With seed share 0 the seed LM takes no step, with 1 its branches.
        groups = [_group(vocabulary, config, jobs[name], cluster) for name in names if jobs[name].steps]
        if groups:
            stages.append(plan_stage(groups, cluster))
    saved_a_step = data_parallel_bytes(shape, len(config.domains), 1, config.layout.bytes_per_weight)
    return {
        "parameters": shape.parameters,
        "cluster": {"gpus": cluster.ranks, "nodes": cluster.nodes, "gpus_per_node": cluster.ranks_per_node}
        | {name: figure for name, figure in asdict(cluster.gpu).items() if name != "devices"},
        "proposed": proposed,
        "stages": [_stage_rows(stage, cluster) for stage in stages],
        "days": sum(stage.seconds for stage in stages) / 86_400,
        "between_groups": {
            "branch_train_merge_bytes": 0,
            "data_parallel_bytes": saved_a_step * config.budget.branch_steps,
            "data_parallel_bytes_a_step": saved_a_step,
        },
    }


def with_proposals(config: RunConfig, shape: ModelShape, cluster: Cluster) -> tuple[RunConfig, dict[str, Any]]:
    """Return the config with proposed layouts where it has none, and the proposals as YAML settings."""
    proposed: dict[str, Any] = {}
    if "layout" in config.model_fields_set:
        return config, proposed
    base = config.layout.model_copy(update={"precision": cluster.gpu.half})
    # A layout of one rank divides every batch, so that jobs can be described before their layout is chosen.
    smallest = base.model_copy(update={"tensor": 1, "context": 1, "data": 1})
    bare = config.model_copy(update={"layout": smallest, "seed_layout": {}})
    layout, micro = propose(shape, _trainings(bare, _branches(bare)), cluster, base)
    proposed["layout"] = _settings(layout, Layout()) | {"micro_batch": micro}
    chosen = config.model_copy(update={"layout": Layout.model_validate(proposed["layout"])})
    if "seed_layout" not in config.model_fields_set:
        seed_layout, micro = propose(shape, _trainings(bare, [SEED]), cluster, base)
        # It overrides `layout`, whose settings apply where `seed_layout` has none.
        proposed["seed_layout"] = _settings(seed_layout, layout) | {"micro_batch": micro}
        chosen = chosen.model_copy(update={"seed_layout": proposed["seed_layout"]})
    return chosen, proposed


def vocabulary_of(config: RunConfig) -> int:
    """Return the size of the run's vocabulary, without loading an existing tokenizer if its config.json has it."""
    if config.tokenizer.path is None:
        return config.tokenizer.vocab_size
    listed = config.tokenizer.path / "config.json"
    size = read_object(listed, ConfigError).get("vocab_size") if listed.is_file() else None
    if size is not None:
        if type(size) is not int or not 0 < size < 1 << 31:
            raise ConfigError(f"{listed}: 'vocab_size' must be a number above 0 and is {shown(size)}. Copy it again.")
        return size
    from btm_scale.data.tokenizer import Tokenizer

    return Tokenizer.load(config.tokenizer.path).vocab_size


def _branches(config: RunConfig) -> list[str]:
    return [*config.expert_domains, *config.random_split_models]


def _group(vocabulary: int, config: RunConfig, job: TrainingJob, cluster: Cluster) -> GroupPlan:
    length = config.budget.sequence_length
    shape = shape_of(config, job.model, vocabulary)
    training = Training(job.model, job.steps, job.sequences, length, config.data.separate_documents, job.trains)
    return plan_group(shape, training, job.layout, cluster)


def _trainings(config: RunConfig, names: Sequence[str]) -> list[Training]:
    jobs = [training_job(config, name) for name in names]
    length, separate = config.budget.sequence_length, config.data.separate_documents
    return [Training(job.model, job.steps, job.sequences, length, separate, job.trains) for job in jobs]


def _settings(layout: Layout, base: Layout) -> dict[str, Any]:
    """Return the settings that turn `base` into `layout`."""
    return {name: value for name in _LAYOUT if (value := getattr(layout, name)) != getattr(base, name)}


def _stage_rows(stage: StagePlan, cluster: Cluster) -> dict[str, Any]:
    """Return a stage with one row for all equal groups."""
    where = {one.work.name: one for one in stage.placed}
    rows: dict[tuple[object, ...], dict[str, Any]] = {}
    for group in stage.groups:
        training = group.training
        # Models of different sizes differ at least in their step time.
        key = (str(group.layout), group.micro_batch, training.steps, training.sequences, training.trains, group.step)
        row = rows.get(key)
        if row is None:
            row = rows[key] = _row(group, cluster)
        row["models"].append(training.name)
        placed = where[training.name]
        row["places"].append({"start": placed.start, "end": placed.end, "nodes": list(placed.nodes)})
    return {
        "seconds": stage.seconds,
        "lower_bound_seconds": stage.bound,
        "waves": len({one.start for one in stage.placed}),
        "groups": list(rows.values()),
    }


def _row(group: GroupPlan, cluster: Cluster) -> dict[str, Any]:
    return {
        "models": [],
        "trains": group.training.trains,
        "layout": str(group.layout),
        "ranks": group.layout.ranks,
        "micro_batch": group.micro_batch,
        "accumulation": group.accumulation,
        "memory_bytes": asdict(group.memory) | {"total": group.memory.total},
        "longest_sequence": longest_sequence(group, cluster),
        "step_seconds": asdict(group.step) | {"total": group.step.total},
        "context_bytes_a_step": group.exchanged,
        "context_spans_nodes": group.spans_nodes,
        "checkpoint_seconds": group.checkpoint,
        "steps": group.training.steps,
        "tokens_per_second": group.tokens_per_second,
        "seconds": group.seconds,
        "places": [],
    }
