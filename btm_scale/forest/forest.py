"""The forest: the set of directories that hold a complete expert.json. There is no other record of it."""

from __future__ import annotations

from btm_scale.forest.expert import Expert, is_finished, read_expert
from btm_scale.run_dir import RunDir


def experts(run: RunDir) -> dict[str, Expert]:
    """Every expert by name, sorted, so that no result depends on the file system's order."""
    if not run.experts.is_dir():
        return {}
    folders = sorted(path for path in run.experts.iterdir() if not path.name.startswith(".") and is_finished(path))
    return {path.name: read_expert(path) for path in folders}
