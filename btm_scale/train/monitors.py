"""DeepSpeed's monitors: runs that are named, grouped and resumed, in the run's folder, without repeated steps."""

from __future__ import annotations

import csv
import io
import os
import re
import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from btm_scale.config.run import RunConfig
from btm_scale.errors import CheckpointError, ConfigError
from btm_scale.run_dir import RunDir
from btm_scale.train.metrics import read_metrics
from btm_scale.util.files import make_directory, refuse_foreign_links, write_file
from btm_scale.util.no_follow import open_no_follow

_FOLDER_DEPTH = 8  # of what monitors write, below their folder in the run
_RUN_ID = re.compile(r"[0-9a-f]{16}")
# By section of `deepspeed`: the package that DeepSpeed imports for it.
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}


def require_monitors(config: RunConfig) -> None:
    """Raise ConfigError if a monitor is enabled whose package is not installed."""
    missing = [name for name, package in _PACKAGES.items() if _enabled(config, name) and find_spec(package) is None]
    if missing:
        packages = " ".join(_PACKAGES[name] for name in missing)
        raise ConfigError(
            f"deepspeed.{missing[0]} is enabled, and {_PACKAGES[missing[0]]} is not installed. The monitor needs it. "
            f"Install it (pip install {packages}), or set enabled: false."
        )


def with_monitors(config: RunConfig, run: RunDir, model: str) -> dict[str, Any]:
    """Return the `deepspeed` section with a name, a group and a folder for each enabled monitor that has none.

    What W&B has no such setting for becomes a variable of this process, unless that is set. The id of a W&B run is
    stored, so that a restart resumes it. Raises CheckpointError for a link of another user among the monitors' files,
    which append to what it leads to.
    """
    refuse_foreign_links(run.monitors, depth=_FOLDER_DEPTH)
    section = dict(config.deepspeed)
    for name in ("tensorboard", "csv_monitor"):
        if _enabled(config, name):
            section[name] = {"output_path": str(run.monitors / name), "job_name": model} | section[name]
    if _enabled(config, "wandb"):
        section["wandb"] = {"project": "btm-scale", "group": config.name} | section["wandb"]
        make_directory(run.monitors / "wandb")
        variables = {"NAME": f"{config.name}/{model}", "RUN_ID": _run_id(run, model), "RESUME": "allow"}
        for variable, value in (variables | {"DIR": str(run.monitors / "wandb")}).items():
            os.environ.setdefault(f"WANDB_{variable}", value)
    if _enabled(config, "comet"):
        section["comet"] = {"experiment_name": f"{config.name}/{model}"} | section["comet"]
    return section


class Monitors:
    """The monitors that a run's `deepspeed` section enables. They get each step of a model once, and nothing else.

    DeepSpeed's engine no longer has them, because it numbers its events by the samples since the process started: W&B
    drops an event whose step is lower than that of an earlier one, and would drop the model's steps.
    """

    def __init__(self, engine: Any, model: str) -> None:
        self._monitor, self._model = engine.monitor, model
        self._sent = 0  # the last step that was sent to W&B and Comet, which cannot drop events
        engine.monitor = SimpleNamespace(enabled=False)

    def record(self, numbers: Mapping[str, float]) -> None:
        """Send a step's metrics."""
        if not self._monitor.enabled:
            return
        step = int(numbers["step"])
        events = [(f"{self._model}/{name}", value, step) for name, value in numbers.items() if name != "step"]
        for monitor in (self._monitor.tb_monitor, self._monitor.csv_monitor):
            if monitor is not None:
                monitor.write_events(events)
        for monitor in (self._monitor.wandb_monitor, self._monitor.comet_monitor):
            if monitor is not None and step > self._sent:
                monitor.write_events(events)
        self._sent = max(self._sent, step)

    def rewind(self, step: int, metrics: Path) -> None:
        """Drop the events after `step`: these steps are taken again.

        W&B and Comet cannot drop events, so the steps that `metrics` already has are not sent to them again.
        """
        if self._monitor.enabled:
            rewind(self._monitor, self._model, step)
            if self._monitor.wandb_monitor is not None or self._monitor.comet_monitor is not None:
                self._sent = max([self._sent, *(row["step"] for row in read_metrics(metrics))])


def rewind(monitor: Any, model: str, step: int) -> None:
    """Drop the events after `step` from the files of this rank's csv_monitor and TensorBoard."""
    if monitor.csv_monitor is not None:
        names = f"{model.replace('/', '_')}_*.csv"
        files = sorted(Path(monitor.csv_monitor.log_dir).glob(names))
        for file in files:
            _drop_rows(file, step)
        # DeepSpeed writes a header to each file whose name it does not know.
        monitor.csv_monitor.filenames = [file.stem for file in files]
    if monitor.tb_monitor is not None:
        writer = monitor.tb_monitor.summary_writer
        writer.close()
        monitor.tb_monitor.summary_writer = type(writer)(log_dir=writer.log_dir, purge_step=step + 1)


def _drop_rows(file: Path, step: int) -> None:
    """Keep the header of a file of csv_monitor once, and its rows up to `step`."""
    header, *rows = list(csv.reader(io.StringIO(file.read_text(errors="replace")))) or [["step", file.stem]]
    kept = [row for row in rows if len(row) == 2 and row[0].isdecimal() and int(row[0]) <= step]
    text = io.StringIO()
    csv.writer(text).writerows([header, *kept])
    write_file(file, text.getvalue())


def _enabled(config: RunConfig, name: str) -> bool:
    section = config.deepspeed.get(name)
    return isinstance(section, Mapping) and bool(section.get("enabled"))


def _run_id(run: RunDir, model: str) -> str:
    """Return the id of a model's W&B run, which is drawn once."""
    path = run.train(model) / "wandb-id"
    if not path.is_file():
        make_directory(path.parent)
        write_file(path, secrets.token_hex(8))
    refusal = CheckpointError(f"{path} is not the id of a W&B run. Delete it: another run is started then.")
    with os.fdopen(open_no_follow(path, os.O_RDONLY, refusal), "rb") as file:
        content = file.read(64).decode("ascii", "replace").strip()
    if not _RUN_ID.fullmatch(content):  # it is sent to W&B
        raise refusal
    return content
