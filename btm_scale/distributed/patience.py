"""A process group for waits that take longer than a collective of training may: saving, reading and merging models."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

_PATIENCE = timedelta(days=7)
_made: list[tuple[dist.ProcessGroup, dist.ProcessGroup]] = []


def patient_group() -> dist.ProcessGroup:
    """Return all ranks as a gloo group that waits for days. The first call is collective: all ranks make it together.

    A rank that dies still ends the wait of the others, because its connections close.
    """
    world = dist.group.WORLD
    assert world is not None
    for known, patient in _made:
        if known is world:
            return patient
    patient = dist.new_group(backend="gloo", timeout=_PATIENCE)
    _made[:] = [(world, patient)]
    return patient
