"""A run as a command opens it: its config, whose names are checked against the table of methods, and its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError
from btm_scale.forest.methods import RESERVED, check_names
from btm_scale.run_dir import RunDir


def open_config(path: Path, overrides: Sequence[str] = (), out: Path | None = None) -> tuple[RunConfig, RunDir]:
    """The run of a YAML with `key.path=value` overrides, and its folder: `out`, or runs/NAME.

    Raises ConfigError for every problem of the YAML, for an unknown average, and for a domain with a reserved name
    that the run in the folder doesn't have already.
    """
    config = RunConfig.load(path, tuple(overrides))
    run = RunDir((out or Path("runs") / config.name).resolve())
    # Read only where it decides: every rank opens its run.
    has_reserved = not RESERVED.isdisjoint(config.all_domains) and run.config.is_file()
    check_names(config, known=RunConfig.load(run.config).all_domains if has_reserved else ())
    return config, run


def open_folder(folder: Path) -> tuple[RunConfig, RunDir]:
    """The run in a folder. Raises ConfigError if there is none, or its config has an unknown average."""
    run = RunDir(folder.resolve())
    if not run.config.is_file():
        raise ConfigError(
            f"{folder} is not a run folder: it has no run.yaml. Give a folder that `btm-scale run` has made."
        )
    config = RunConfig.load(run.config)
    check_names(config, known=config.all_domains)
    return config, run
