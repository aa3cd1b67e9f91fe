"""The forest: the set of directories that hold a complete expert.json. There is no other record of it."""

from __future__ import annotations

from btm_scale.errors import ForestError
from btm_scale.forest.expert import Expert, find_expert, is_finished, read_expert
from btm_scale.run_dir import RunDir


def experts(run: RunDir) -> dict[str, Expert]:
    """Return every expert by name, sorted, so that no result depends on the file system's order."""
    if not run.experts.is_dir():
        return {}
    folders = sorted(path for path in run.experts.iterdir() if not path.name.startswith("."))
    return {path.name: card for path in folders if (card := find_expert(path)) is not None}


def require_experts(run: RunDir) -> dict[str, Expert]:
    """Return every expert by name. Raises ForestError if there are none."""
    forest = experts(run)
    if not forest:
        raise ForestError(no_expert(run))
    return forest


def no_expert(run: RunDir) -> str:
    """Return the message for a run without experts."""
    return f"There is no expert in {run.experts}. Train some first: btm-scale run CONFIG"


def lineage(run: RunDir) -> dict[str, dict[str, float]]:
    """Return the parents, with their weights, of every expert and its ancestors; parents before children.

    Parents that were removed or belong to another run are included, without parents.
    """
    family: dict[str, dict[str, float]] = {}

    waiting = list(reversed(experts(run)))
    opened: dict[str, dict[str, float]] = {}  # by model: the parents, which are visited before it
    while waiting:
        name = waiting[-1]
        if name not in opened:
            parents = read_expert(run.model(name)).parents if is_finished(run.model(name)) else ()
            opened[name] = {parent.name: parent.weight for parent in parents}
            waiting += [parent for parent in reversed(opened[name]) if parent not in opened]
        else:
            family.setdefault(waiting.pop(), opened[name])
    return family


def ancestors(run: RunDir, name: str) -> set[str]:
    """Return the models of this run that a model descends from, including itself."""
    models: set[str] = set()
    waiting = [name]
    while waiting:
        model = waiting.pop()
        if model not in models and is_finished(run.model(model)):
            models.add(model)
            waiting += [parent.name for parent in read_expert(run.model(model)).parents]
    return models
