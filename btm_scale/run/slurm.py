"""Run on a SLURM cluster: submit the jobs of a run that are neither done nor queued."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.data.preview import preview_texts
from btm_scale.data.sources import resolve_sources
from btm_scale.errors import GroupFailed, LaunchError
from btm_scale.launch import slurm, slurm_commands
from btm_scale.launch.slurm_commands import AtLimit, SlurmBusy
from btm_scale.launch.slurm_faults import nodes_to_exclude
from btm_scale.launch.slurm_queue import Submissions, Submitted
from btm_scale.run.slurm_jobs import TEXT, big_domains, jobs, write_scripts
from btm_scale.run.stages import EVALUATE, PREPARE, prepare_stage
from btm_scale.run.state import is_done, is_newest, is_prepared, open_run
from btm_scale.run_dir import RunDir
from btm_scale.util.files import make_directory

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 2.0, 60.0  # seconds, until SLURM is asked again whether it accepts jobs


def submit_run(
    config: RunConfig, run: RunDir, *, dry_run: bool, reread: Callable[[], RunConfig] | None = None
) -> dict[str, Any]:
    """Submit what is missing; returns the ids of the new jobs. A dry run writes the scripts and submits none.

    Waits while SLURM accepts no more jobs of this user. `reread`: as in `open_run`. Raises GroupFailed if a job fails
    meanwhile on which others depend.
    """
    # Missing text and rows without text are reported before anything is submitted.
    sources = resolve_sources(config.all_domains, config.text_root, config.tokenizer.path)
    preview_texts(sources, config, config.tokenizer.vocab_size)
    config = open_run(config, run, reread=reread)
    most, big = slurm_commands.max_array_size(), big_domains(config, sources)
    listed = jobs(config, most, big)
    scripts = write_scripts(_without_bad_nodes(config, run, listed), run, most, big)
    if config.launch.device != "cpu" and not slurm.requests_gpus(config.launch.slurm):
        logger.warning("The jobs request no GPU. Set launch.slurm.gres, such as gpu:8, to train on GPUs.")
    submitter = _Submitter(config, run, listed, scripts)
    if not dry_run:
        with submitter.submissions.alone():
            submitter.submit_all()
        if not submitter.submitted:
            logger.info("nothing to submit: all jobs are completed or in the queue")
    return {"scripts": {name: str(path) for name, path in scripts.items()}, "submitted": submitter.submitted}


def _without_bad_nodes(config: RunConfig, run: RunDir, listed: Sequence[slurm.Job]) -> RunConfig:
    """Return the config with which scripts are written: it excludes nodes that have failed groups of this run."""
    section = config.launch.slurm
    needed = max(slurm.nodes_of(job, section)[0] for job in listed)
    bad, room = nodes_to_exclude(run, section.max_excluded, section.partition, needed)
    names = ([section.exclude] if section.exclude else []) + [node.name for node in bad]
    changed = section.model_copy(update={"exclude": ",".join(names) or None, "max_excluded": room})
    return config.model_copy(update={"launch": config.launch.model_copy(update={"slurm": changed})})


class _Submitter:
    """Submits the jobs of a run in passes over all of them, as many as SLURM accepts in each."""

    def __init__(
        self, config: RunConfig, run: RunDir, listed: Sequence[slurm.Job], scripts: Mapping[str, Path]
    ) -> None:
        self.submitted: dict[str, str] = {}  # the last id of each job
        self.submissions = Submissions(run.root / "slurm")
        self._config, self._run, self._jobs, self._scripts = config, run, listed, scripts
        self._given: set[tuple[str, str | None]] = set()  # submitted by this call: job and model
        self._parts: dict[str, list[str]] = {}  # the ids of each array that `at_a_time` limits
        self._rejected: str | None = None

    def submit_all(self) -> None:
        """Submit every missing job. Raises GroupFailed once all others are submitted if some of them failed."""
        wait = _FIRST_WAIT
        while True:
            before = len(self._given)
            try:
                failed, held_up = self._pass()
                break
            except AtLimit as limit:
                if not limit.is_named and not slurm_commands.queue():
                    raise LaunchError(
                        f"SLURM accepts no job of this user, although none is queued: {limit}. A job must keep the "
                        "limits of its QOS and partition: change launch.slurm, and rerun."
                    ) from None
                if str(limit) != self._rejected:
                    logger.info(
                        "SLURM accepts no more jobs of this user for now (%s): waiting for jobs to end. Interrupt to "
                        "stop waiting; the same command submits the rest later.",
                        limit,
                    )
                self._rejected = str(limit)
            except SlurmBusy as busy:
                if self._rejected is None:
                    raise
                # An outage does not end hours of waiting, in which jobs were submitted.
                logger.warning("%s", str(busy).replace("No job was submitted. ", ""))
            wait = _FIRST_WAIT if len(self._given) > before else min(2 * wait, _LONGEST_WAIT)
            time.sleep(wait)
        if failed:
            raise GroupFailed(
                f"SLURM jobs failed while others waited to be submitted: {', '.join(failed)}. What depends on them was "
                f"not submitted: {', '.join(held_up)}. See btm-scale status {self._run.root}, and rerun to resume."
            )

    def _pass(self) -> tuple[list[str], list[str]]:
        """Submit what is missing; returns the jobs that this call submitted and that failed, and those held up by them.

        Raises AtLimit if SLURM accepts no more.
        """
        queue = slurm_commands.queue()
        self.submissions.settle(queue)
        live = self.submissions.live(queue)
        ids: dict[str, list[str]] = {}
        failed: list[str] = []
        held_up: list[str] = []
        for place, job in enumerate(self._jobs):
            # A model may be queued under the name of another job, if arrays were cut differently then.
            under_way = {
                model: entry.id
                for (name, model), entry in live.items()
                if (model in job.models if job.models else name == job.name)
            }
            after = [number for name in job.after for number in ids[name]]
            if job.name == EVALUATE and None in under_way and self.submitted:
                slurm_commands.cancel(under_way.pop(None))  # its dependencies no longer include every job
            ids[job.name] = list(under_way.values())
            tasks = self._missing(job, under_way, is_first=not (live or self.submitted))
            if tasks is None:
                continue
            if not {*failed, *held_up}.isdisjoint(job.after):
                held_up.append(job.name)
                continue
            lost = [task for task in tasks if (job.name, job.models[task]) in self._given]
            if lost or (job.name, None) in self._given:
                failed.append(job.name)
                tasks = [task for task in tasks if task not in lost]
                if not tasks:
                    continue
            running = {number.partition("_")[0] for number in queue}
            beside = [*self._beside(place, ids), *(made for made in self._parts.get(job.name, []) if made in running)]
            self._submit_parts(job, tasks, after, beside, ids[job.name])
        return failed, held_up

    def _submit_parts(
        self, job: slurm.Job, tasks: list[int], after: list[str], beside: list[str], ids: list[str]
    ) -> None:
        """Submit the tasks of a job: at once, or in smaller arrays if SLURM accepts no more. Extends `ids`."""
        size = len(tasks)
        while True:
            part, tasks = tasks[:size], tasks[size:]
            try:
                made = self._submit(job, part, after, beside)
            except AtLimit:
                if size < 2:
                    raise
                tasks, size = part + tasks, (size + 1) // 2
                continue
            self.submitted[job.name] = made.id
            ids.append(made.id)
            if self._limit(job) is not None:  # the parts of an array run in turn, each with the limit of the array
                self._parts.setdefault(job.name, []).append(made.id)
                beside = [*beside, made.id]
            models = f" ({', '.join(made.models.values())})" if job.is_array else ""
            later = f", after {', '.join(after)}" if after else ""
            logger.info("%s%s: SLURM job %s%s", job.name, models, made.id, later)
            if not tasks:
                return

    def _submit(self, job: slurm.Job, tasks: list[int], after: list[str], beside: list[str]) -> Submitted:
        for place in tasks if job.template == "train" else ():
            make_directory(self._run.train(job.models[place]))
            (self._run.train(job.models[place]) / "lost").unlink(missing_ok=True)
        for stage in self._stages(job, tasks):  # its earlier tries may have had less time
            (self._run.root / "slurm" / f"{stage}.tries").unlink(missing_ok=True)
        models = {str(place) if job.is_array else "": job.models[place] for place in tasks}
        entry = Submitted(job.name, "", models, slurm.job_name(self._config.name, job))
        self.submissions.note(entry)
        try:
            number = slurm_commands.submit(
                self._scripts[job.name],
                after=after,
                tasks=tasks if job.is_array else None,
                limit=self._limit(job),
                beside=beside,
            )
        except AtLimit:
            self.submissions.forget_unanswered()
            raise
        if number is None:  # among other lines of a site's sbatch there is none with an id, or more than one
            self.submissions.settle(slurm_commands.queue())
            number = self.submissions.read()[-1].id
        if not number:
            raise LaunchError(
                f"sbatch has accepted {self._scripts[job.name]}, and printed no line with a job id. It must print one "
                "with --parsable: check whether sbatch is a script of this site. Then rerun; a job that is queued by "
                "then is not submitted again."
            )
        entry = replace(entry, id=number)
        self.submissions.note(entry)
        self._given |= {(job.name, model) for model in models.values() or [None]}
        return entry

    def _missing(self, job: slurm.Job, under_way: Mapping[str | None, str], *, is_first: bool) -> list[int] | None:
        """Return the array indices of models that are neither done nor queued; None if there is nothing to submit."""
        if job.models:
            places = [
                place for place, model in enumerate(job.models) if model not in under_way and not self._is_done(model)
            ]
            return places or None
        if under_way:
            return None
        if job.name == PREPARE:
            return None if is_prepared(self._config, self._run, job.domains) else []
        return None if is_first and is_newest(self._config, self._run, self._run.report) else []

    def _stages(self, job: slurm.Job, tasks: list[int]) -> list[str]:
        """Return the stages that these tasks of a job do, if it trains no model."""
        if job.template == "texts":
            return [prepare_stage(job.models[place].removeprefix(TEXT)) for place in tasks]
        return [job.name] if job.name in (PREPARE, EVALUATE) else []

    def _is_done(self, task: str) -> bool:
        """Return whether a model is done, or the text of a domain is prepared."""
        if task.startswith(TEXT):
            return self._run.fingerprint(task.removeprefix(TEXT)).is_file()
        return is_done(self._config, self._run, task)

    def _arrays(self, job: slurm.Job) -> list[str]:
        """Return the names of the arrays of experts that run beside this one and share `at_a_time` with it."""
        return [other.name for other in self._jobs if _has_experts(other) and other.after == job.after]

    def _limit(self, job: slurm.Job) -> int | None:
        """Return how many tasks of an array may run at once, so that all arrays beside it keep `at_a_time`."""
        most = self._config.launch.slurm.at_a_time
        if most is None or not _has_experts(job):
            return None
        arrays = self._arrays(job)
        return max(1, most // len(arrays) + (arrays.index(job.name) < most % len(arrays)))

    def _beside(self, place: int, ids: Mapping[str, list[str]]) -> list[str]:
        """Return the ids of the array that must end before this one may start, if there are more than `at_a_time`."""
        job, most = self._jobs[place], self._config.launch.slurm.at_a_time
        if most is None or not _has_experts(job):
            return []
        arrays = self._arrays(job)
        turn = arrays.index(job.name) - most
        return ids.get(arrays[turn], []) if turn >= 0 else []


def _has_experts(job: slurm.Job) -> bool:
    return job.is_array and job.template == "train"
