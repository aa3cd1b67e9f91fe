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


def lineage(run: RunDir) -> dict[str, dict[str, float]]:
    """Every expert's parents with their weights, and so on up to the seed LM; parents before children.

    A parent that is gone, or was another run's, is named all the same and has no parents here.
    """
    family: dict[str, dict[str, float]] = {}

    def visit(name: str) -> None:
        if name in family:
            return
        parents = read_expert(run.model(name)).parents if is_finished(run.model(name)) else ()
        for parent in parents:
            visit(parent.name)
        family[name] = {parent.name: parent.weight for parent in parents}

    for name in experts(run):
        visit(name)
    return family


def ancestors(run: RunDir, name: str) -> set[str]:
    """The models of this run that a model comes from, itself included."""
    found: set[str] = set()
    waiting = [name]
    while waiting:
        model = waiting.pop()
        if model not in found and is_finished(run.model(model)):
            found.add(model)
            waiting += [parent.name for parent in read_expert(run.model(model)).parents]
    return found
