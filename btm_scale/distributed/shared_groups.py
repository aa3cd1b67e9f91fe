"""One process group for every set of ranks, instead of one for each purpose that Megatron-core has for it.

A rank alone otherwise has twenty groups. Each group of gloo has three threads, of which one wakes up a hundred times
per second, and each group of NCCL that is used has its buffers on the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


@contextmanager
def shared_groups(parallel_state: Any) -> Iterator[None]:
    """While this is active, groups that Megatron-core creates with the same ranks and settings are the same object.

    All ranks then issue the collectives of these groups in the same order, as they must within one group: a rank's
    thread issues them one after another.
    """
    create = parallel_state.create_group
    made: dict[tuple[Any, ...], Any] = {}

    def created(
        ranks: Any = None,
        timeout: Any = None,
        backend: str | None = None,
        pg_options: Any = None,
        use_local_synchronization: bool = False,
        group_desc: str | None = None,
    ) -> Any:
        key = tuple(ranks), timeout, backend or dist.get_backend(), use_local_synchronization
        if pg_options is not None:
            return create(ranks, timeout, backend, pg_options, use_local_synchronization, group_desc)
        if key not in made:
            made[key] = create(ranks, timeout, backend, None, use_local_synchronization, group_desc)
        return made[key]

    parallel_state.create_group = created
    try:
        yield
    finally:
        parallel_state.create_group = create
