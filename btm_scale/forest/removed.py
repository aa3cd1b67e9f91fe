"""removed.json: the experts that were removed from a run, so that a removal that is given again succeeds."""

from __future__ import annotations

from btm_scale.errors import ForestError
from btm_scale.forest.expert import is_finished
from btm_scale.forest.forest import lineage
from btm_scale.run_dir import RunDir
from btm_scale.util.records import InsideName, Record


class Removed(Record):
    """removed.json: the names of experts and of untrained branches whose removal began; some may have returned."""

    ERROR = ForestError
    REMEDY = "Delete it; a removal that is given again is then an error."

    names: tuple[InsideName, ...] = ()


def note_removal(run: RunDir, name: str) -> None:
    """Record that an expert is about to be removed. The caller holds the lock of `removing`."""
    names = {*(Removed.find(run.removed) or Removed()).names, name}
    Removed(names=tuple(sorted(names))).save(run.removed)


def was_removed(run: RunDir, name: str) -> bool:
    """Return whether a name is that of an expert that was removed: by the record, or because others descend from it."""
    if is_finished(run.model(name)):
        return False
    record = Removed.find(run.removed)
    return (record is not None and name in record.names) or name in lineage(run)
