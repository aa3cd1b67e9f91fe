"""Run on a SLURM cluster: determine the jobs, and submit those that are neither done nor queued."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.data.preview import preview_texts
from btm_scale.data.sources import resolve_sources
from btm_scale.errors import LaunchError
from btm_scale.launch import slurm, slurm_queue
from btm_scale.run.state import is_done, open_run
from btm_scale.run_dir import DENSE, RunDir
from btm_scale.train.jobs import is_trained, model_names, training_job, training_stages
from btm_scale.util.files import make_directory, write_file

logger = logging.getLogger(__name__)
PREPARE, EXPERTS, EVALUATE = "prepare", "experts", "evaluate"


def jobs(config: RunConfig) -> list[slurm.Job]:
    """Return every job of a run, after the jobs that it depends on. Experts with equal group sizes share an array."""
    first, *later = training_stages(config)
    result = [slurm.Job(PREPARE, "prepare", uses_gpus=False)]
    result += [_training(config, name, (name,), (PREPARE,)) for name in first]
    before = tuple(first)
    for number, stage in enumerate(later, start=1):
        own = [_training(config, DENSE, (DENSE,), before)] if DENSE in stage else []
        shapes: dict[tuple[int, int], list[str]] = {}
        for model in stage:
            if model != DENSE:
                layout = training_job(config, model).layout
                shapes.setdefault((layout.ranks, layout.colocated), []).append(model)
        for models in shapes.values():
            place = [str(number)] * (len(later) > 1) + [f"{len(own)}"] * (len(shapes) > 1)
            own.append(_training(config, "-".join([EXPERTS, *place]), tuple(models), before, is_array=True))
        result += own
        before = tuple(job.name for job in own)
    after = tuple(job.name for job in result if job.models)
    layout = config.layout
    result.append(slurm.Job(EVALUATE, "evaluate", ranks=layout.ranks, colocated=layout.colocated, after=after))
    on_cpu = config.launch.device == "cpu"
    return [replace(job, uses_gpus=False) for job in result] if on_cpu else result


def write_scripts(config: RunConfig, run: RunDir) -> dict[str, Path]:
    """Write every job's script into the run's folder; returns their paths by job."""
    texts = {job.name: slurm.render(job, config.name, run, config.launch.slurm) for job in jobs(config)}
    folder = run.root / "slurm"
    make_directory(folder)
    paths = {}
    for name, text in texts.items():
        paths[name] = folder / f"{name}.sh"
        write_file(paths[name], text)
        paths[name].chmod(0o755)
    return paths


def submit_run(
    config: RunConfig, run: RunDir, *, dry_run: bool, reread: Callable[[], RunConfig] | None = None
) -> dict[str, Any]:
    """Submit what is missing; returns the ids of the new jobs. A dry run writes the scripts and submits none.

    `reread`: as in `open_run`.
    """
    # Missing text and rows without text are reported before anything is submitted.
    preview_texts(resolve_sources(config.all_domains, config.text_root), config, config.tokenizer.vocab_size)
    config = open_run(config, run, reread=reread)
    scripts = write_scripts(config, run)
    if config.launch.device != "cpu" and not slurm.requests_gpus(config.launch.slurm):
        logger.warning("The jobs request no GPU. Set launch.slurm.gres, such as gpu:8, to train on GPUs.")
    if dry_run:
        return {"scripts": {name: str(path) for name, path in scripts.items()}, "submitted": {}}
    submissions = slurm_queue.Submissions(run.root / "slurm")
    submitted: dict[str, str] = {}
    with submissions.alone():
        queue = slurm_queue.queue()
        submissions.settle(queue)
        live = submissions.live(queue)
        ids: dict[str, list[str]] = {}
        for job in jobs(config):
            under_way = {model: entry.id for (name, model), entry in live.items() if name == job.name}
            after = [number for name in job.after for number in ids[name]]
            if job.name == EVALUATE and None in under_way and submitted:
                slurm_queue.cancel(under_way.pop(None))  # its dependencies no longer include every job
            ids[job.name] = list(under_way.values())
            tasks = _missing(config, run, job, under_way, is_first=not (live or submitted))
            if tasks is None:
                continue
            made = _submit(config, run, job, scripts[job.name], after, tasks, submissions)
            submitted[job.name] = made.id
            ids[job.name].append(made.id)
            models = f" ({', '.join(made.models.values())})" if job.is_array else ""
            later = f", after {', '.join(after)}" if after else ""
            logger.info("%s%s: SLURM job %s%s", job.name, models, made.id, later)
    if not submitted:
        logger.info("nothing to submit: all jobs are completed or in the queue")
    return {"scripts": {name: str(path) for name, path in scripts.items()}, "submitted": submitted}


def queue_notes(run: RunDir) -> dict[str, tuple[bool, str]]:
    """Return, for each model in SLURM's queue, whether it is running, and a note. Empty without SLURM."""
    submissions = slurm_queue.Submissions(run.root / "slurm")
    if not submissions.read() or not slurm_queue.is_here():
        return {}
    with contextlib.suppress(LaunchError):  # a controller that is temporarily down says nothing about the run
        live = submissions.live(slurm_queue.queue())
        return {
            model or job: (entry.state in ("RUNNING", "COMPLETING"), str(entry)) for (job, model), entry in live.items()
        }
    return {}


def _training(
    config: RunConfig, name: str, models: tuple[str, ...], after: tuple[str, ...], *, is_array: bool = False
) -> slurm.Job:
    layout = training_job(config, models[0]).layout
    return slurm.Job(name, "train", models, layout.ranks, layout.colocated, after, is_array)


def _missing(
    config: RunConfig, run: RunDir, job: slurm.Job, under_way: dict[str | None, str], *, is_first: bool
) -> list[int] | None:
    """Return the array indices of models that are neither done nor queued; None if there is nothing to submit."""
    if job.models:
        places = [
            place
            for place, model in enumerate(job.models)
            if model not in under_way and not is_done(config, run, model)
        ]
        return places or None
    if under_way:
        return None
    done = _is_prepared(config, run) if job.name == PREPARE else is_first and _is_evaluated(config, run)
    return None if done else []


def _submit(
    config: RunConfig,
    run: RunDir,
    job: slurm.Job,
    script: Path,
    after: list[str],
    tasks: list[int],
    submissions: slurm_queue.Submissions,
) -> slurm_queue.Submitted:
    for place in tasks:
        make_directory(run.train(job.models[place]))
        (run.train(job.models[place]) / "lost").unlink(missing_ok=True)
    limit = config.launch.slurm.at_a_time
    models = {str(place) if job.is_array else "": job.models[place] for place in tasks}
    entry = slurm_queue.Submitted(job.name, "", models, slurm.job_name(config.name, job))
    submissions.note(entry)
    number = slurm_queue.submit(script, after=after, tasks=tasks if job.is_array else None, limit=limit)
    entry = replace(entry, id=number)
    submissions.note(entry)
    return entry


def _is_prepared(config: RunConfig, run: RunDir) -> bool:
    return run.tokenizer.is_dir() and all(run.fingerprint(name).is_file() for name in config.all_domains)


def _is_evaluated(config: RunConfig, run: RunDir) -> bool:
    """Return whether the report is newer than every model."""
    if not run.report.is_file():
        return False
    if not all(is_trained(config, run, model) for model in model_names(config)):
        return False
    cards = [run.model(model) / "expert.json" for model in model_names(config)]
    return all(card.is_file() and card.stat().st_mtime <= run.report.stat().st_mtime for card in cards)
