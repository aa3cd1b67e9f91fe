"""One intra-op thread of torch, for results that do not depend on the machine's cores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from btm_scale.util.imports import torch


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Use one thread in this block, so that sums have the same order on any machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
