"""What killed commands left of experts that they added or removed; the next command that writes removes it."""

from __future__ import annotations

import shutil
from pathlib import Path

from btm_scale.config.run import RunConfig
from btm_scale.forest.expert import is_finished
from btm_scale.run_dir import LONGER_DENSE, OWN_NAMES, RunDir
from btm_scale.util.leftovers import PARTIAL, sweep
from btm_scale.util.locks import alone_at_once

REMOVED = ".removed"  # ends the names of folders that are being removed


def remove_abandoned(config: RunConfig, run: RunDir) -> None:
    """Remove what killed commands left in a run; nothing while another process gives experts their names."""
    for folder in (run.root, run.experts):
        sweep(folder)
    if not _abandoned(config, run):
        return
    with alone_at_once(run.config_lock) as is_alone:
        for path in _abandoned(config, run) if is_alone else ():
            if path.is_symlink():
                path.unlink(missing_ok=True)
            else:
                shutil.rmtree(path, ignore_errors=True)  # another user's may stay


def _abandoned(config: RunConfig, run: RunDir) -> list[Path]:
    """Return the scores of experts that were not added, and what removals renamed but did not delete."""
    scores = run.model_scores("")
    paths = [path for path in scores.iterdir() if _has_no_model(config, run, path)] if scores.is_dir() else []
    for parent in (run.experts, scores, run.train("")):
        paths += parent.glob(f".*{REMOVED}")
    return sorted(paths)


def _has_no_model(config: RunConfig, run: RunDir, scores: Path) -> bool:
    """Whether a folder has the scores of an expert that neither exists, nor is being added, nor is to be trained."""
    name = scores.name
    if name.startswith("."):
        return name.endswith(PARTIAL) and not (run.experts / name).exists()
    is_expert = name not in OWN_NAMES and not name.startswith(LONGER_DENSE)
    return is_expert and name not in config.expert_domains and not is_finished(run.model(name))
