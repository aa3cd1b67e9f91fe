"""The jobs of a run on a SLURM cluster, and their scripts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from btm_scale.config.run import RunConfig
from btm_scale.launch import slurm
from btm_scale.launch.slurm_commands import DEFAULT_MAX_ARRAY_SIZE
from btm_scale.run_dir import DENSE, MOE, RunDir
from btm_scale.train.jobs import training_job, training_stages
from btm_scale.util.files import make_directory, write_file

PREPARE, EXPERTS, EVALUATE = "prepare", "experts", "evaluate"


def jobs(config: RunConfig, most: int = DEFAULT_MAX_ARRAY_SIZE) -> list[slurm.Job]:
    """Return every job of a run, after the jobs that it depends on.

    Experts with equal group sizes share an array, of which each has at most `most` tasks.
    """
    first, *later = training_stages(config)
    result = [slurm.Job(PREPARE, "prepare", uses_gpus=False)]
    result += [_training(config, name, (name,), (PREPARE,)) for name in first]
    before = tuple(first)
    for number, stage in enumerate(later, start=1):
        own = [_training(config, model, (model,), before) for model in (DENSE, MOE) if model in stage]
        shapes: dict[tuple[int, int], list[str]] = {}
        for model in stage:
            if model not in (DENSE, MOE):
                layout = training_job(config, model).layout
                shapes.setdefault((layout.ranks, layout.colocated), []).append(model)
        arrays = [models[i : i + most] for models in shapes.values() for i in range(0, len(models), most)]
        for models in arrays:
            place = [str(number)] * (len(later) - ([MOE] in later) > 1) + [f"{len(own)}"] * (len(arrays) > 1)
            own.append(_training(config, "-".join([EXPERTS, *place]), tuple(models), before, is_array=True))
        result += own
        before = tuple(job.name for job in own)
    after = tuple(job.name for job in result if job.models)
    layout = config.layout
    result.append(slurm.Job(EVALUATE, "evaluate", ranks=layout.ranks, colocated=layout.colocated, after=after))
    on_cpu = config.launch.device == "cpu"
    return [replace(job, uses_gpus=False) for job in result] if on_cpu else result


def write_scripts(config: RunConfig, run: RunDir, most: int = DEFAULT_MAX_ARRAY_SIZE) -> dict[str, Path]:
    """Write every job's script into the run's folder; returns their paths by job. `most` as in `jobs`."""
    texts = {job.name: slurm.render(job, config.name, run, config.launch.slurm) for job in jobs(config, most)}
    folder = run.root / "slurm"
    make_directory(folder)
    paths = {}
    for name, text in texts.items():
        paths[name] = folder / f"{name}.sh"
        write_file(paths[name], text)
        paths[name].chmod(0o755)
    return paths


def _training(
    config: RunConfig, name: str, models: tuple[str, ...], after: tuple[str, ...], *, is_array: bool = False
) -> slurm.Job:
    layout = training_job(config, models[0]).layout
    return slurm.Job(name, "train", models, layout.ranks, layout.colocated, after, is_array)
