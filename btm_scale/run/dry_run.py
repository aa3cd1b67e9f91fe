"""Dry run: report what a run would do, without writing files or building models."""

from __future__ import annotations

from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.data.sources import resolve_sources
from btm_scale.forest.expert import is_finished
from btm_scale.run.launchers import placement
from btm_scale.run.state import continued, on_this_device
from btm_scale.run_dir import RunDir
from btm_scale.train.jobs import training_job, training_stages


def dry_run(config: RunConfig, run: RunDir, *, trains_here: bool = True) -> dict[str, Any]:
    """Return what a run would do: its models, their steps, batches and layouts. Writes nothing.

    Checks every text path, changes to an existing run's config and, if the groups run on this machine (`trains_here`),
    their precisions. Raises as `run` would.
    """
    sources = resolve_sources(config.all_domains, config.text_root)
    config = continued(config, run)
    if trains_here:
        config = on_this_device(config, run)
    jobs = {}
    for stage in training_stages(config):
        place = placement(config, stage)
        for model in stage:
            job = training_job(config, model)
            jobs[model] = {
                "parents": job.branch.parents if job.branch is not None else None,
                "steps": job.steps,
                "batch": f"{job.sequences} x {config.budget.sequence_length} tokens",
                "layout": str(job.layout),
                "at_a_time": place.slots,
                "done": is_finished(run.model(model)),
            }
    rows = config.tokenizer.vocab_size if config.tokenizer.path is None else None
    shape = config.model.shape(rows or 1, config.budget.sequence_length)
    return {
        "run": str(run.root),
        "parameters": shape.parameters if rows else "known with the tokenizer",
        "text": {source.name: {"files": len(source.files), "bytes": source.bytes} for source in sources},
        "models": jobs,
    }
