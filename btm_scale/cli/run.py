"""Verbs that make a run, or look at one."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from btm_scale.cli.options import (
    ConfigFile,
    Launcher,
    Out,
    RunFolder,
    Settings,
    flag,
    is_rank,
    launcher,
    one_of,
    opened,
    option,
    several,
)
from btm_scale.cli.show import show_jobs, show_results
from btm_scale.cli.verb import Answer, Json, say, silent, verb
from btm_scale.errors import LaunchError
from btm_scale.launch.gpus import GPUS
from btm_scale.run.launcher_table import LAUNCHERS, LOCAL

if TYPE_CHECKING:
    from btm_scale.config.run import RunConfig
    from btm_scale.run_dir import RunDir

logger = logging.getLogger(__name__)

_DEMO_BYTES = 3_000_000  # of text per domain

app = typer.Typer()
_SECTION = "Runs"


@verb(app, "demo", section=_SECTION)
def demo(
    *,
    out: Annotated[Path | None, option("--out", "DIR", "The run's folder.  [default: runs/demo]")] = None,
    settings: Settings,
    as_json: Json = False,
) -> Answer:
    """Run Branch-Train-Merge on text of this installation.

    Trains a small seed LM, four experts and a dense baseline in runs/demo; a CPU takes minutes.
    """
    from btm_scale.configs import FOLDER
    from btm_scale.data.demo_text import write_installed_text
    from btm_scale.forest.open import open_config
    from btm_scale.run_dir import RunDir
    from btm_scale.util.files import new_directory

    run_dir = RunDir((out or Path("runs") / "demo").resolve())
    text = run_dir.root / "text"
    if not text.is_dir():
        with new_directory(text) as directory:
            write_installed_text(directory, bytes_per_domain=_DEMO_BYTES)
    config, run_dir = open_config(FOLDER / "demo.yaml", (f"text_root={text}", *settings), run_dir.root)
    return _run(config, run_dir, LOCAL, as_json)


@verb(app, "run", section=_SECTION)
def run(
    config: ConfigFile,
    *,
    out: Out = None,
    settings: Settings,
    launcher: Launcher = LOCAL,
    dry_run: Annotated[
        bool,
        flag("--dry-run", "Check the config and report what would be done. With slurm, also write the job scripts."),
    ] = False,
    as_json: Json = False,
) -> Answer:
    """Run all stages of a config, from text to page.

    Completed stages are skipped: run the same command again to resume a run that was interrupted.
    """
    run_config, run_dir = _config_and_run(config, settings, out)
    submit = LAUNCHERS[launcher].submit
    if submit is not None:
        jobs = submit(run_config, run_dir, dry_run=dry_run, reread=_reread(config, settings, run_dir))
        return Answer(jobs, lambda: show_jobs(jobs, run_dir.root, dry_run=dry_run), is_brief=True)
    if dry_run:
        from rich.console import Console

        from btm_scale.report.dry_run_table import print_dry_run
        from btm_scale.run.dry_run import dry_run as plan_run

        require = LAUNCHERS[launcher].require
        if require is not None:
            require(run_config)
        planned = plan_run(run_config, run_dir, trains_here=launcher == LOCAL)
        return Answer(planned, lambda: print_dry_run(planned, Console()))
    return _run(run_config, run_dir, launcher, as_json, _reread(config, settings, run_dir))


@verb(app, "prepare", section=_SECTION)
def prepare(
    config: ConfigFile,
    *,
    out: Out = None,
    settings: Settings,
    domains: Annotated[
        list[str],
        several("--domain", "NAME", "Prepare this domain. May be repeated.  [default: all]"),
    ],
) -> Answer:
    """Train the tokenizer and write the token files.

    The answer is a table of the domains. --verbose prints the documents and bytes of each split. Once there is a
    tokenizer, several processes may prepare different domains at once.
    """
    from btm_scale.report.encoding_bar import encoding_bars
    from btm_scale.run.preparing import prepare_run
    from btm_scale.run.state import open_run
    from btm_scale.run.status import data_summary
    from btm_scale.train.passes import passes_of_run, require_few_passes

    run_config, run_dir = _config_and_run(config, settings, out)
    run_config = open_run(run_config, run_dir, reread=_reread(config, settings, run_dir))
    with encoding_bars(quiet=not logger.isEnabledFor(logging.INFO)) as show_progress:
        fingerprints = prepare_run(run_config, run_dir, show_progress, domains)
    summary, passes = data_summary(run_dir, fingerprints), passes_of_run(run_config, run_dir)
    require_few_passes(run_config, {name: number for name, number in passes.items() if name in fingerprints})

    def show() -> None:
        from rich.console import Console

        from btm_scale.report.data_table import data_table

        Console().print(data_table(summary["domains"]))
        say(f"The token files are in {run_dir.data}")

    return Answer(summary, show, is_brief=True)


@verb(app, "train", section=_SECTION)
def train(
    config: ConfigFile,
    *,
    out: Out = None,
    settings: Settings,
    models: Annotated[
        list[str],
        several(
            "--model",
            "seed|dense|EXPERT",
            "Train this model. May be repeated.  [default: all that can be trained next]",
        ),
    ],
    launcher: Annotated[
        str, launcher(LAUNCHERS, "With slurm, mpi or env this process is a rank that was started.")
    ] = LOCAL,
    as_json: Json = False,
) -> Answer:
    """Train, export and score models.

    Each model is trained by one group of ranks; the groups run side by side. Completed models are skipped.
    """
    run_config, run_dir = _config_and_run(config, settings, out)
    if is_rank(launcher):
        from btm_scale.util.devices import hide_gpus_if_on_cpu

        hide_gpus_if_on_cpu(run_config.launch.device)
        from btm_scale.run.state import as_recorded, require_prepared
        from btm_scale.run.worker import train_as_rank

        if len(models) != 1:
            raise LaunchError("A rank trains one model. Give its name: --model seed, --model dense or --model EXPERT.")
        if not LAUNCHERS[launcher].starts:
            require_prepared(run_config, run_dir)
            run_config = as_recorded(run_config, run_dir)
        train_as_rank(run_config, run_dir, models[0])
    else:
        from btm_scale.run.state import next_models, open_run, require_prepared
        from btm_scale.train.jobs import training_job
        from btm_scale.train.passes import passes_of_run, require_few_passes

        for model in models:
            training_job(run_config, model)  # raises for an unknown name
        require_prepared(run_config, run_dir)
        require_few_passes(run_config, passes_of_run(run_config, run_dir))
        reread = _reread(config, settings, run_dir)
        run_config = open_run(run_config, run_dir, trains_here=launcher == LOCAL, reread=reread)
        models = models or next_models(run_config, run_dir)
        _train(run_config, run_dir, models, launcher, as_json)
    return Answer({"models": {model: str(run_dir.model(model)) for model in models}}, silent)


@verb(app, "plan", section=_SECTION)
def plan(
    config: ConfigFile,
    *,
    nodes: Annotated[int, option("--nodes", "N", "Nodes of the cluster.", min=1)],
    gpus_per_node: Annotated[int, option("--gpus-per-node", "N", "GPUs of each node.", min=1)] = 8,
    gpu: Annotated[
        str, one_of("--gpu", "GPU", GPUS, f"Kind of GPU: {', '.join(GPUS)}.", metavar="GPU", any_case=True)
    ] = "h100",
    out: Out = None,
    settings: Settings,
) -> Answer:
    """Estimate memory, step time and placement on a cluster.

    The cluster is described by the options; this command needs no GPU.
    """
    from btm_scale.launch.gpus import gpu_named
    from btm_scale.launch.plan import Cluster
    from btm_scale.run.plan import make_plan

    run_config, _ = _config_and_run(config, settings, out)
    estimate = make_plan(run_config, Cluster(gpu_named(gpu), nodes, gpus_per_node))

    def show() -> None:
        from rich.console import Console

        from btm_scale.report.plan_table import print_plan

        print_plan(estimate, Console())

    return Answer(estimate, show)


@verb(app, "status", section=_SECTION)
def status(
    run: RunFolder,
    *,
    watch: Annotated[bool, flag("--watch", "Update the table until no model is being trained.")] = False,
    check: Annotated[
        bool, flag("--check", "Exit with code 1 if a stage has failed, or nothing that runs or is queued completes it.")
    ] = False,
    as_json: Json = False,
) -> Answer:
    """Show the training progress of every model of a run, and stages that failed."""
    from btm_scale.launch.slurm_faults import faulty_nodes
    from btm_scale.report.passes import passes_line
    from btm_scale.report.progress_table import live_table, print_progress, progress_as_json
    from btm_scale.run.slurm_notes import slurm_notes
    from btm_scale.run.stage_status import stage_status, stages_as_json
    from btm_scale.run.status import failures, problems, run_status
    from btm_scale.run.status import watch as watch_run
    from btm_scale.train.passes import passes_of_run

    config, run_dir = opened(run)
    if watch:
        with live_table(quiet=as_json) as update:
            watch_run(config, run_dir, update)
    slurm = slurm_notes(run_dir)
    rows = run_status(config, run_dir, slurm)
    stages = stage_status(config, run_dir, slurm)
    failed = failures(rows, run_dir)
    passes = passes_of_run(config, run_dir)
    found, nodes = problems(rows, stages, run_dir, slurm), faulty_nodes(run_dir)

    def show() -> None:
        if not watch:
            print_progress(rows)
        if passes:
            say(passes_line(passes))
        for node in nodes:
            say(f"{node}; new jobs exclude it, up to launch.slurm.max_excluded nodes" if node.is_bad else str(node))
        for model, failure in failed.items():
            say(f"\n{model} failed: {failure}")
        shown = tuple(f"{model} failed: " for model in failed)
        for problem in found:
            if not problem.startswith(shown) and (check or "failed: " in problem):
                say(f"\n{problem}")

    reasons = {row.model: row.note for row in rows if row.state == "failed"}
    reasons |= {model: str(failure) for model, failure in failed.items()}
    document = progress_as_json(rows) | {"stages": stages_as_json(stages), "failures": reasons, "problems": found}
    document["nodes"] = {node.name: {"faults": node.faults, "reason": node.reason} for node in nodes}
    return Answer(document | {"passes": passes}, show, exit_code=1 if check and found else 0)


@verb(app, "doctor", section=_SECTION)
def doctor() -> Answer:
    """Report what works on this machine, and what is missing.

    The exit code is 1 if this machine can neither train nor merge.
    """
    from btm_scale.report.doctor_table import print_doctor
    from btm_scale.run.doctor import examine

    report = examine(Path())
    return Answer(report, lambda: print_doctor(report), exit_code=0 if report["works"] else 1)


def _run(
    config: RunConfig,
    run_dir: RunDir,
    launcher: str,
    as_json: bool,
    reread: Callable[[], RunConfig] | None = None,
) -> Answer:
    from btm_scale.report.page import report as write_report
    from btm_scale.report.progress_table import live_table
    from btm_scale.run.launchers import launcher_named
    from btm_scale.run.pipeline import run_all

    run_groups = launcher_named(launcher, config)
    with live_table(quiet=as_json or not logger.isEnabledFor(logging.INFO)) as show:
        results = run_all(config, run_dir, on_progress=show, launcher=run_groups, reread=reread)
    write_report(config, run_dir, results)
    document: dict[str, Any] = results.document()
    return Answer(document, lambda: show_results(results, run_dir.report))


def _train(config: RunConfig, run_dir: RunDir, models: list[str], launcher: str, as_json: bool) -> None:
    train_here = LAUNCHERS[launcher].train
    if train_here is not None:
        train_here(config, run_dir, models)
        return
    from btm_scale.report.progress_table import live_table
    from btm_scale.run.launchers import launcher_named, run_training

    with live_table(quiet=as_json or not logger.isEnabledFor(logging.INFO)) as show:
        run_training(config, run_dir, models, on_progress=show, launcher=launcher_named(launcher, config))


def _config_and_run(config: Path, settings: list[str], out: Path | None) -> tuple[RunConfig, RunDir]:
    from btm_scale.forest.open import open_config

    return open_config(config, settings, out)


def _reread(config: Path, settings: list[str], run_dir: RunDir) -> Callable[[], RunConfig] | None:
    """Return a function that reads the config again if it is that of the run's folder; None for any other."""
    if config.resolve() != run_dir.config:
        return None
    return lambda: _config_and_run(config, settings, run_dir.root)[0]
