"""The memory that PyTorch's allocator held while a profiler ran."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile


def memory_profiler() -> profile:
    """Return a profiler of allocations, for a with statement."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def allocations(profiler: profile) -> list[int]:
    """Return the bytes that PyTorch's allocator held after each allocation since the profiler started."""
    assert profiler.profiler is not None
    result = profiler.profiler.kineto_results
    assert result is not None
    pending, held = list(result.experimental_event_tree()), []
    while pending:
        event = pending.pop()
        pending += event.children
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            held.append(event.typed[1].total_allocated)
    return held
