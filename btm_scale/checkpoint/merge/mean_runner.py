"""Compute many means of the same models in one pass: each model is read once and added to all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from btm_scale.checkpoint.formats.tensors import ModelReader
from btm_scale.checkpoint.hashing import BlockHashes
from btm_scale.checkpoint.merge.arrays import add_outer
from btm_scale.checkpoint.merge.plan import Unit
from btm_scale.checkpoint.merge.runner import Buffers, Target, parts_of
from btm_scale.util.imports import torch

_THREAD_BYTES = 16 << 20  # of all models' parts, and of all outputs', in memory per thread
_CACHED_BYTES = 1 << 20  # of sums, which stay in a core's cache beside the models' parts


@dataclass(frozen=True)
class _Group:
    """Targets that are means of the same models, in the same order."""

    members: Sequence[int]  # indices of the targets
    models: Sequence[ModelReader]
    weights: torch.Tensor  # float64 [members, models]
    sums: torch.Tensor  # float64 [members, 1], of each target's weights


class MeansRunner:
    """Merges, writes and hashes one unit of every target, all of method `linear`; thread-safe.

    Every element is rounded as often and in the same order as by `linear` for one target.
    """

    def __init__(self, targets: Sequence[Target], chunk_bytes: int) -> None:
        self.targets, self.chunk_bytes = targets, chunk_bytes
        self._buffers = Buffers()
        self._groups = _groups(targets)
        self._models = list(dict.fromkeys(model for target in targets for model in target.inputs))

    def __call__(self, unit: Unit) -> tuple[Unit, list[list[str]]]:
        """Return the unit and, per target, its block hashes."""
        hashes = [BlockHashes() for _ in self.targets]
        chunk_bytes = min(self.chunk_bytes, _THREAD_BYTES // max(len(self.targets), len(self._models)))
        step = chunk_bytes // self.targets[0].plan.specs[unit.name].itemsize
        for part in parts_of(unit, step):
            stored = {model: self._buffers.stored(model, part, model) for model in self._models}
            for group in self._groups:
                for i, row in zip(group.members, self._rows(group, part, stored), strict=True):
                    self.targets[i].count(unit, row, row)
                    self.targets[i].writer.write_range(part.name, part.start, row)
                    hashes[i].update(row)
        return unit, [each.finished() for each in hashes]

    def _rows(self, group: _Group, part: Unit, stored: dict[ModelReader, torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield a part of each of the group's targets, in the dtype in which it is written."""
        plan = self.targets[group.members[0]].plan
        if plan.copies(part.name):
            dtype, plans = plan.specs[part.name].dtype, [self.targets[i].plan for i in group.members]
            return (stored[group.models[each.how(part.name).models[0]]].to(dtype) for each in plans)
        outputs, elements = len(group.members), part.stop - part.start
        dtype = plan.specs[part.name].dtype
        rows = self._buffers.array("output", outputs * elements, dtype).view(outputs, elements)
        step = max(1, _CACHED_BYTES // (8 * outputs))
        for start in range(0, elements, step):
            stop = min(start + step, elements)
            totals = self._buffers.array("sums", outputs * (stop - start), torch.float64).view(outputs, -1)
            totals.zero_()
            for model, weights in zip(group.models, group.weights.unbind(1), strict=True):
                add_outer(totals, weights, self._buffers.widened(stored[model][start:stop], "input"))
            rows[:, start:stop] = totals.div_(group.sums)
        return iter(rows)


def _groups(targets: Sequence[Target]) -> list[_Group]:
    members: dict[tuple[ModelReader, ...], list[int]] = {}
    for i, target in enumerate(targets):
        members.setdefault(tuple(target.inputs), []).append(i)
    groups = []
    for models, own in members.items():
        weights = [[source.weight for source in targets[i].plan.sources] for i in own]
        sums = torch.tensor([[sum(row)] for row in weights], dtype=torch.float64)
        groups.append(_Group(own, models, torch.tensor(weights, dtype=torch.float64), sums))
    return groups
