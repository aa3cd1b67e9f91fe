"""Verbs that make a run, or look at one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from btm_scale.cli.common import Answer, is_rank, opened, say, show_results, shown

if TYPE_CHECKING:
    from btm_scale.config.run import RunConfig
    from btm_scale.run_dir import RunDir


def demo(options: argparse.Namespace) -> Answer:
    """Run Branch-Train-Merge on text of this installation."""
    from btm_scale.run.demo import demo_config

    config, run = demo_config(options.out, options.set)
    return _run(options, config, run)


def run(options: argparse.Namespace) -> Answer:
    """Run every stage of a config that isn't done."""
    config, run_dir = _config_and_run(options)
    if options.launcher == "slurm":
        from btm_scale.run.slurm import submit_run

        return shown(options, submit_run(config, run_dir, dry_run=options.dry_run, say=say))
    if options.dry_run:
        from btm_scale.run.pipeline import dry_run

        return shown(options, dry_run(config, run_dir))
    return _run(options, config, run_dir)


def prepare(options: argparse.Namespace) -> Answer:
    """Train the tokenizer and write the token files."""
    from btm_scale.data.prepare import prepare as prepare_data
    from btm_scale.run.pipeline import data_summary
    from btm_scale.run.state import open_run

    config, run_dir = _config_and_run(options)
    open_run(config, run_dir)
    return shown(options, data_summary(run_dir, prepare_data(config, run_dir)))


def train(options: argparse.Namespace) -> Answer:
    """Train, export and score models: those that are named, or all that can be trained next, side by side."""
    config, run_dir = _config_and_run(options)
    if is_rank(options):
        from btm_scale.run.worker import train_as_rank

        [model] = options.model
        train_as_rank(config, run_dir, model)
    else:
        from btm_scale.run.state import next_models, open_run

        open_run(config, run_dir)
        options.model = options.model or next_models(config, run_dir)
        _train(options, config, run_dir)
    return {"models": {model: str(run_dir.model(model)) for model in options.model}}


def plan(options: argparse.Namespace) -> Answer:
    """Layout, memory, time and place of every group on a cluster that need not be there."""
    from btm_scale.config.run import RunConfig
    from btm_scale.launch.gpus import gpu_named
    from btm_scale.launch.plan import Cluster
    from btm_scale.run.plan import make_plan

    config = RunConfig.load(options.config, tuple(options.set))
    made = make_plan(config, Cluster(gpu_named(options.gpu), options.nodes, options.gpus_per_node))
    if not options.json:
        from rich.console import Console

        from btm_scale.report.plan_table import print_plan

        print_plan(made, Console())
    return made


def status(options: argparse.Namespace) -> Answer:
    """Show how far every model of a run is."""
    from btm_scale.report.progress_table import live_table, print_progress, progress_as_json
    from btm_scale.run.status import failures, run_status, watch

    config, run_dir = opened(options)
    if options.watch:
        with live_table(quiet=options.json) as show:
            rows = watch(config, run_dir, show)
    else:
        rows = run_status(config, run_dir)
        if not options.json:
            print_progress(rows)
    failed = failures(rows, run_dir)
    if not options.json:
        for model, failure in failed.items():
            print(f"\n{model} failed: {failure}")
    return progress_as_json(rows) | {"failures": {model: str(failure) for model, failure in failed.items()}}


def _run(options: argparse.Namespace, config: RunConfig, run_dir: RunDir) -> Answer:
    from btm_scale.report.page import report as write_report
    from btm_scale.report.progress_table import live_table
    from btm_scale.run.launchers import launcher_named
    from btm_scale.run.pipeline import run_all

    launcher = launcher_named(options.launcher, config)
    with live_table(quiet=options.json) as show:
        results = run_all(config, run_dir, on_progress=show, say=say, launcher=launcher)
    write_report(config, run_dir, results)
    show_results(options, results)
    say(f"The page is {run_dir.report}")
    return results


def _train(options: argparse.Namespace, config: RunConfig, run_dir: RunDir) -> None:
    from btm_scale.run.launchers import launcher_named, train_under_mpi

    if options.launcher == "mpi":
        train_under_mpi(config, run_dir, options.model)
        return
    from btm_scale.report.progress_table import live_table
    from btm_scale.run.launchers import run_training

    with live_table(quiet=options.json) as show:
        launcher = launcher_named(options.launcher, config)
        run_training(config, run_dir, options.model, on_progress=show, launcher=launcher)


def _config_and_run(options: argparse.Namespace) -> tuple[RunConfig, RunDir]:
    from btm_scale.config.run import RunConfig
    from btm_scale.run_dir import RunDir

    config = RunConfig.load(options.config, tuple(options.set))
    return config, RunDir((options.out or Path("runs") / config.name).resolve())
