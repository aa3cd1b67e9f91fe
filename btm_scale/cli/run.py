"""Verbs that make a run, or look at one."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from btm_scale.cli.common import Answer, is_rank, opened, say, show_results, shown
from btm_scale.run.launcher_table import LAUNCHERS, LOCAL

if TYPE_CHECKING:
    from btm_scale.config.run import RunConfig
    from btm_scale.run_dir import RunDir

_DEMO_BYTES = 3_000_000  # of text per domain


def demo(options: argparse.Namespace) -> Answer:
    """Run Branch-Train-Merge on text of this installation."""
    from pathlib import Path

    from btm_scale.configs import FOLDER
    from btm_scale.data.demo_text import write_installed_text
    from btm_scale.forest.open import open_config
    from btm_scale.run_dir import RunDir
    from btm_scale.util.files import new_directory

    run_dir = RunDir((options.out or Path("runs") / "demo").resolve())
    text = run_dir.root / "text"
    if not text.is_dir():
        with new_directory(text) as directory:
            write_installed_text(directory, bytes_per_domain=_DEMO_BYTES)
    config, run_dir = open_config(FOLDER / "demo.yaml", (f"text_root={text}", *options.set), run_dir.root)
    return _run(options, config, run_dir)


def run(options: argparse.Namespace) -> Answer:
    """Run every stage of a config that isn't done."""
    config, run_dir = _config_and_run(options)
    submit = LAUNCHERS[options.launcher].submit
    if submit is not None:
        return shown(options, submit(config, run_dir, dry_run=options.dry_run, say=say))
    if options.dry_run:
        from btm_scale.run.dry_run import dry_run

        return shown(options, dry_run(config, run_dir, trains_here=options.launcher == LOCAL))
    return _run(options, config, run_dir)


def prepare(options: argparse.Namespace) -> Answer:
    """Train the tokenizer and write the token files."""
    from btm_scale.data.prepare import prepare as prepare_data
    from btm_scale.run.state import open_run
    from btm_scale.run.status import data_summary

    config, run_dir = _config_and_run(options)
    config = open_run(config, run_dir)
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

        config = open_run(config, run_dir, trains_here=options.launcher == LOCAL)
        options.model = options.model or next_models(config, run_dir)
        _train(options, config, run_dir)
    return {"models": {model: str(run_dir.model(model)) for model in options.model}}


def plan(options: argparse.Namespace) -> Answer:
    """Layout, memory, time and place of every group on a cluster that need not be there."""
    from btm_scale.launch.gpus import gpu_named
    from btm_scale.launch.plan import Cluster
    from btm_scale.run.plan import make_plan

    config, _ = _config_and_run(options)
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


def doctor(options: argparse.Namespace) -> Answer:
    """Show what this machine has, what is missing, and what works; exit code 1 if it can neither train nor merge."""
    from pathlib import Path

    from btm_scale.report.doctor_table import print_doctor
    from btm_scale.run.doctor import examine

    answer = examine(Path())
    if not options.json:
        print_doctor(answer)
    options.exit_code = 0 if answer["works"] else 1
    return answer


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
    return results.document()


def _train(options: argparse.Namespace, config: RunConfig, run_dir: RunDir) -> None:
    train_here = LAUNCHERS[options.launcher].train
    if train_here is not None:
        train_here(config, run_dir, options.model)
        return
    from btm_scale.report.progress_table import live_table
    from btm_scale.run.launchers import launcher_named, run_training

    with live_table(quiet=options.json) as show:
        launcher = launcher_named(options.launcher, config)
        run_training(config, run_dir, options.model, on_progress=show, launcher=launcher)


def _config_and_run(options: argparse.Namespace) -> tuple[RunConfig, RunDir]:
    from btm_scale.forest.open import open_config

    return open_config(options.config, options.set, options.out)
