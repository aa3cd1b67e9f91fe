"""ZeRO 3: each weight matrix is cut over the data ranks as soon as it is drawn, so no rank holds the complete model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch.nn.modules.module import register_module_module_registration_hook

# They draw their weights in their constructors. Norms and learned positions are small, and left to the engine.
_MATRICES = (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)


@dataclass(frozen=True)
class Partition:
    """How DeepSpeed will partition the weights: over the ranks of `group`, with the config of the engine."""

    group: dist.ProcessGroup
    deepspeed: Mapping[str, Any]
    dtype: torch.dtype

    @contextlib.contextmanager
    def of_new_modules(self) -> Iterator[None]:
        """Cut the weight matrices of the modules that are built in this context. All ranks of the group enter it."""
        import deepspeed

        first: list[Any] = []

        def cut(parent: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
            if not isinstance(module, _MATRICES):
                return
            new = [parameter for parameter in module.parameters() if not is_partitioned(parameter)]
            if first and new:
                first[0].convert_to_zero_parameters(param_list=new)
            elif new:
                # Every parameter keeps this object, which partitions and gathers it.
                deepspeed.zero.Init(
                    module=module,
                    data_parallel_group=self.group,
                    config_dict_or_path=dict(self.deepspeed),
                    dtype=self.dtype,
                )
                first.append(new[0])

        hook = register_module_module_registration_hook(cut)
        try:
            yield
        finally:
            hook.remove()


def is_partitioned(parameter: torch.nn.Parameter) -> bool:
    """Return whether this rank holds only a part of a parameter, as with ZeRO 3."""
    return hasattr(parameter, "ds_id")


def complete_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Return the shape of a parameter with all of its elements; a partitioned one is empty itself."""
    return torch.Size(parameter.ds_shape) if is_partitioned(parameter) else parameter.shape  # type: ignore[attr-defined]


@contextlib.contextmanager
def complete(parameter: torch.nn.Parameter, *, changes: bool = False) -> Iterator[torch.nn.Parameter]:
    """Yield a parameter with all of its elements, gathered from the data ranks if it is partitioned.

    With `changes`, the first data rank's new elements are kept. All data ranks call this together.
    """
    if not is_partitioned(parameter):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if changes else None):
        yield parameter
