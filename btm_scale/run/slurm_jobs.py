"""The jobs of a run on a SLURM cluster, and their scripts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from btm_scale.config.run import RunConfig
from btm_scale.data.sources import DomainSource
from btm_scale.launch import slurm
from btm_scale.launch.slurm_commands import DEFAULT_MAX_ARRAY_SIZE
from btm_scale.run.stages import EVALUATE, PREPARE
from btm_scale.run_dir import DENSE, MOE, RunDir
from btm_scale.train.jobs import training_job, training_stages
from btm_scale.util.files import make_directory, set_mode, write_file

TEXTS, EXPERTS = "texts", "experts"
TEXT = "text/"  # before the name of a domain that a task prepares: experts have the same names


def big_domains(config: RunConfig, sources: Sequence[DomainSource]) -> tuple[str, ...]:
    """Return the domains that are prepared side by side, each by a task of an array, if several are big enough.

    Those whose documents are placed by file, field or position are left out: what they keep depends on the domains
    before them. At least one domain is left to the job that makes the tokenizer.
    """
    limit = config.launch.slurm.big_domain
    big = [source for source in sources if source.bytes >= limit and source.settings.split_by == "document"]
    if len(big) == len(sources):
        big.remove(min(big, key=lambda source: source.bytes))
    return tuple(source.name for source in big) if len(big) > 1 else ()


def jobs(config: RunConfig, most: int = DEFAULT_MAX_ARRAY_SIZE, big: Sequence[str] = ()) -> list[slurm.Job]:
    """Return every job of a run, after the jobs that it depends on.

    Experts with equal group sizes share an array, of which each has at most `most` tasks; so do the `big` domains.
    """
    first, *later = training_stages(config)
    rest = tuple(name for name in config.all_domains if name not in big) if big else ()
    result = [slurm.Job(PREPARE, "prepare", uses_gpus=False, domains=rest)]
    texts = [f"{TEXT}{name}" for name in big]
    parts = [tuple(texts[i : i + most]) for i in range(0, len(texts), most)]
    for index, part in enumerate(parts):
        name = f"{TEXTS}-{index}" if len(parts) > 1 else TEXTS
        result.append(slurm.Job(name, "texts", part, after=(PREPARE,), is_array=True, uses_gpus=False, prefix=TEXT))
    prepared = tuple(job.name for job in result if job.models) or (PREPARE,)
    result += [_training(config, name, (name,), prepared) for name in first]
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
    after = tuple(job.name for job in result if job.template == "train")
    layout = config.layout
    result.append(slurm.Job(EVALUATE, "evaluate", ranks=layout.ranks, colocated=layout.colocated, after=after))
    on_cpu = config.launch.device == "cpu"
    return [replace(job, uses_gpus=False) for job in result] if on_cpu else result


def write_scripts(
    config: RunConfig, run: RunDir, most: int = DEFAULT_MAX_ARRAY_SIZE, big: Sequence[str] = ()
) -> dict[str, Path]:
    """Write every job's script into the run's folder; returns their paths by job. `most` and `big` as in `jobs`."""
    texts = {job.name: slurm.render(job, config.name, run, config.launch.slurm) for job in jobs(config, most, big)}
    folder = run.root / "slurm"
    make_directory(folder)
    paths = {}
    for name, text in texts.items():
        paths[name] = folder / f"{name}.sh"
        write_file(paths[name], text)
        set_mode(paths[name], 0o755)
    return paths


def _training(
    config: RunConfig, name: str, models: tuple[str, ...], after: tuple[str, ...], *, is_array: bool = False
) -> slurm.Job:
    layout = training_job(config, models[0]).layout
    return slurm.Job(name, "train", models, layout.ranks, layout.colocated, after, is_array)
