"""Open a run for a command: its folder, and its config with names checked against the table of methods."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from btm_scale.config.run import RunConfig
from btm_scale.errors import ConfigError
from btm_scale.forest.methods import RESERVED, check_names
from btm_scale.run_dir import RunDir
from btm_scale.util.files import refuse_foreign_links

logger = logging.getLogger(__name__)


def open_config(path: Path, overrides: Sequence[str] = (), out: Path | None = None) -> tuple[RunConfig, RunDir]:
    """Return the config of a YAML with `key.path=value` overrides, and the run's folder: `out`, or runs/NAME.

    Raises ConfigError for every problem of the YAML, for an unknown average, and for a domain with a reserved name
    that the run in the folder does not already have.
    """
    config = RunConfig.load(path, tuple(overrides))
    run = RunDir((out or Path("runs") / config.name).resolve())
    if run.root.is_file():
        raise ConfigError(f"--out {out} is a file. The run needs a folder: give the path of a new one.")
    refuse_foreign_links(run.root)
    before = Path("runs") / "run"  # of versions that named every unnamed run so
    if out is None and not config.is_named and not run.config.is_file() and RunDir(before).config.is_file():
        logger.warning("%s is an unnamed run of an earlier version. To resume it, give --out %s", before, before)
    # The recorded config is read only if needed, because every rank opens its run.
    has_reserved = not RESERVED.isdisjoint(config.all_domains) and run.config.is_file()
    check_names(config, known=RunConfig.load(run.config).all_domains if has_reserved else ())
    return config, run


def open_folder(folder: Path, config_file: Path | None = None) -> tuple[RunConfig, RunDir]:
    """Return the config (run.yaml, or that of another file) and paths of a run folder.

    Raises ConfigError if it is not one, or has an unknown average, and CheckpointError for a link in it that another
    user made.
    """
    run = RunDir(folder.resolve())
    if not run.config.is_file():
        raise ConfigError(
            f"{folder} is not a run folder: it has no run.yaml. Give a folder created by `btm-scale run`."
        )
    refuse_foreign_links(run.root)
    config = RunConfig.load(config_file or run.config)
    check_names(config, known=config.all_domains)
    return config, run
